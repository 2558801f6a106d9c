// SPDX-License-Identifier: Apache-2.0
/* WRAP: pthread_create mmap ioctl ppoll */
/* Address spaces that outlive their process. A file that some process has mapped can't be sealed. */
#include <sys/ioctl.h>

#include "test.h"

#define LENGTH ((size_t)1 << 20)
#define TIMEOUT_NS (5000 * MS)

WRAPPER(void *, MAP_FAILED, mmap,
	(void *addr, size_t length, int prot, int flags, int fd, off_t offset),
	(addr, length, prot, flags, fd, offset))

int __real_ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout,
		 const sigset_t *mask);
int __wrap_ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout,
		 const sigset_t *mask);
static struct injection inject_ppoll;
static bool ppoll_times_out;

int __wrap_ppoll(struct pollfd *fds, nfds_t count, const struct timespec *timeout,
		 const sigset_t *mask)
{
	if (injected(&inject_ppoll))
		return -1;
	if (ppoll_times_out)
		return 0;
	return __real_ppoll(fds, count, timeout, mask);
}

int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *),
			  void *argument);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *),
			  void *argument);
static struct injection inject_pthread_create;

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *),
			  void *argument)
{
	if (injected(&inject_pthread_create))
		return errno;
	return __real_pthread_create(thread, attr, run, argument);
}

int __real_ioctl(int fd, unsigned long request, void *argument);
int __wrap_ioctl(int fd, unsigned long request, void *argument);
static struct injection inject_ioctl;

int __wrap_ioctl(int fd, unsigned long request, void *argument)
{
	if (injected(&inject_ioctl))
		return -1;
	return __real_ioctl(fd, request, argument);
}

struct process {
	pid_t pid;
	int file; /* that it has mapped */
};

static struct process process;

static void process_kill(void)
{
	if (process.pid > 0) {
		(void)kill(process.pid, SIGKILL);
		(void)waitpid(process.pid, NULL, 0);
		process.pid = 0;
	}
}

static void process_start(void)
{
	int ready[2];
	char byte;

	process.file = memfd_create("ram", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	CHECK(process.file >= 0);
	CHECK(ftruncate(process.file, (off_t)LENGTH) == 0);
	CHECK(pipe2(ready, O_CLOEXEC) == 0);
	process.pid = fork();
	CHECK(process.pid >= 0);
	if (process.pid == 0) {
		char *ram = __real_mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_SHARED,
					process.file, 0);

		if (ram == MAP_FAILED || prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
			_exit(1);
		memset(ram, 1, LENGTH);
		if (write(ready[1], "", 1) != 1)
			_exit(1);
		for (;;)
			pause();
	}
	close(ready[1]);
	CHECK_INT(read(ready[0], &byte, 1), 1);
	close(ready[0]);
}

static int sealed(void)
{
	return fcntl(process.file, F_ADD_SEALS, F_SEAL_WRITE);
}

static void process_forget(void)
{
	const int64_t deadline_ns = hu_deadline_ns(TIMEOUT_NS);

	process_kill();
	while (sealed() < 0 && hu_monotonic_ns() < deadline_ns)
		(void)usleep(1000);
	CHECK_INT(sealed(), 0); /* nobody has it mapped any more */
	close(process.file);
}

static void test_outlives(void)
{
	process_start();
	int fd = hu_address_space_hold(process.pid, TIMEOUT_NS);

	CHECK(fd >= 0);
	CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
	process_kill(); /* and reaped */
	CHECK(sealed() < 0);
	CHECK_INT(errno, EBUSY);
	close(fd);
	process_forget();
}

static void test_of_the_living(void)
{
	process_start();
	int fd = hu_address_space_hold(process.pid, TIMEOUT_NS);
	int other = hu_address_space_hold(process.pid, TIMEOUT_NS);

	CHECK(fd >= 0 && other >= 0);
	close(fd);
	CHECK(kill(process.pid, 0) == 0); /* it has noticed nothing */
	process_kill();
	CHECK(sealed() < 0);
	close(other);
	process_forget();
}

/* The holder dies by SIGKILL: nothing is held, and nothing stands in the way of its own death. */
static void test_holder_is_killed(void)
{
	int ready[2];
	int byte = 0;

	process_start();
	CHECK(pipe2(ready, O_CLOEXEC) == 0);

	pid_t holder = fork();

	CHECK(holder >= 0);
	if (holder == 0) {
		int fd = hu_address_space_hold(process.pid, TIMEOUT_NS);

		if (write(ready[1], &fd, sizeof(fd)) != sizeof(fd))
			_exit(1);
		for (;;)
			pause();
	}
	CHECK_INT(read(ready[0], &byte, sizeof(byte)), sizeof(byte));
	CHECK(byte >= 0);
	close(ready[0]);
	close(ready[1]);
	process_kill();
	CHECK(sealed() < 0);
	CHECK(kill(holder, SIGKILL) == 0);
	CHECK_INT(waitpid(holder, NULL, 0), holder);
	process_forget();
}

static void test_refuses(void)
{
	CHECK_INT(hu_address_space_hold(0, TIMEOUT_NS), -EINVAL);
	CHECK_INT(hu_address_space_hold(0x3fffffff, TIMEOUT_NS), -ESRCH);

	process_start();
	CHECK(kill(process.pid, SIGKILL) == 0);

	siginfo_t info;

	CHECK(waitid(P_PID, (id_t)process.pid, &info, WEXITED | WNOWAIT) == 0);
	CHECK_INT(hu_address_space_hold(process.pid, TIMEOUT_NS), -ESRCH); /* dead, not reaped */
	process_forget();
}

static void test_not_ours(void)
{
	int status;

	process_start();

	pid_t other = fork();

	CHECK(other >= 0);
	if (other == 0) {
		if (setresgid(65534, 65534, 65534) < 0 || setresuid(65534, 65534, 65534) < 0)
			_exit(2);
		_exit(hu_address_space_hold(process.pid, TIMEOUT_NS) == -EACCES ? 0 : 1);
	}
	CHECK_INT(waitpid(other, &status, 0), other);
	CHECK_INT(status, 0);
	process_forget();
}

#define CHECK_INJECTED(name, number, after, wanted)                                           \
	do {                                                                                  \
		inject_##name =                                                               \
			(struct injection){ .error = (number), .skip = (after), .times = 1 }; \
		CHECK_INT(hu_address_space_hold(process.pid, TIMEOUT_NS), (wanted));          \
		inject_##name = (struct injection){ 0 };                                      \
		CHECK_INT(count_fds(), files);                                                \
	} while (0)

static void test_errors(void)
{
	process_start();

	const int files = count_fds();

	CHECK_INJECTED(mmap, ENOMEM, 0, -ENOMEM);
	CHECK_INJECTED(pthread_create, EAGAIN, 0, -EAGAIN);
	CHECK_INJECTED(ioctl, EINVAL, 0, -EINVAL);
	CHECK_INJECTED(ioctl, ENOMEM, 1, -ENOMEM);
	process_forget();
}

/* The reader frees itself then, on its own time. */
static void test_waits_no_longer(void)
{
	process_start();
	ppoll_times_out = true;
	CHECK_INT(hu_address_space_hold(process.pid, TIMEOUT_NS), -ETIMEDOUT);
	ppoll_times_out = false;
	inject_ppoll = (struct injection){ .error = EINTR, .times = 3 };

	int fd = hu_address_space_hold(process.pid, TIMEOUT_NS);

	CHECK(fd >= 0);
	CHECK_INT(inject_ppoll.times, 0);
	inject_ppoll = (struct injection){ .error = ENOMEM, .times = 1 };
	CHECK_INT(hu_address_space_hold(process.pid, TIMEOUT_NS), -ENOMEM);
	close(fd);
	process_forget();
}

int main(void)
{
	test_cleanup = process_kill;
	if (geteuid() != 0) {
		fprintf(stderr, "needs root: userfaultfd for what the kernel does\n");
		return SKIP;
	}
	test_refuses();
	if (syscall(SYS_userfaultfd, O_CLOEXEC) < 0) {
		fprintf(stderr, "the rest not tested: no userfaultfd (valgrind knows none)\n");
		return errno == ENOSYS ? 0 : 1;
	}
	test_outlives();
	test_of_the_living();
	test_holder_is_killed();
	test_not_ours();
	test_errors();
	test_waits_no_longer();
	return 0;
}
