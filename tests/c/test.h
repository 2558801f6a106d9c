/* SPDX-License-Identifier: Apache-2.0 */
/* What the C tests share: checks, errors injected in the C library, guests in cgroups. */
#ifndef HOSTUPDATE_TEST_H
#define HOSTUPDATE_TEST_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "internal.h"

#define SKIP 77
#define MS 1000000LL
#define MAYBE_UNUSED __attribute__((unused))

static void (*test_cleanup)(void); /* what must not stay behind when a check fails */

#define CHECK(condition)                                                                          \
	do {                                                                                      \
		if (!(condition)) {                                                               \
			fprintf(stderr, "%s:%d: %s: not so: %s (errno %d)\n", __FILE__, __LINE__, \
				__func__, #condition, errno);                                     \
			if (test_cleanup)                                                         \
				test_cleanup();                                                   \
			exit(1);                                                                  \
		}                                                                                 \
	} while (0)

#define CHECK_INT(expression, wanted)                                                            \
	do {                                                                                     \
		long long got_ = (long long)(expression), wanted_ = (long long)(wanted);         \
		if (got_ != wanted_) {                                                           \
			fprintf(stderr, "%s:%d: %s: %s is %lld, not %lld\n", __FILE__, __LINE__, \
				__func__, #expression, got_, wanted_);                           \
			if (test_cleanup)                                                        \
				test_cleanup();                                                  \
			exit(1);                                                                 \
		}                                                                                \
	} while (0)

/* ---- injection: the call after `skip` others fails, `times` in a row ---- */

static pid_t inject_not_in; /* this process is spared */

struct injection {
	int error; /* 0: none */
	int skip;
	int times;
};

static MAYBE_UNUSED int injected(struct injection *injection)
{
	if (injection->error == 0 || injection->times == 0)
		return 0;
	if (inject_not_in && inject_not_in == getpid())
		return 0;
	if (injection->skip > 0) {
		injection->skip--;
		return 0;
	}
	injection->times--;
	errno = injection->error;
	return 1;
}

#define WRAPPER(type, failure, name, parameters, arguments) \
	type __real_##name parameters;                      \
	type __wrap_##name parameters;                      \
	static struct injection inject_##name;              \
	type __wrap_##name parameters                       \
	{                                                   \
		if (injected(&inject_##name))               \
			return failure;                     \
		return __real_##name arguments;             \
	}

#define INJECT(name, number, after) \
	(inject_##name = (struct injection){ .error = (number), .skip = (after), .times = 1 })

/* syscall(): only the call of that number fails. */
#define WRAP_SYSCALL                                                              \
	long __real_syscall(long number, long a, long b, long c, long d, long e); \
	long __wrap_syscall(long number, long a, long b, long c, long d, long e); \
	static struct injection inject_syscall;                                   \
	static long inject_syscall_number;                                        \
	long __wrap_syscall(long number, long a, long b, long c, long d, long e)  \
	{                                                                         \
		if (number == inject_syscall_number && injected(&inject_syscall)) \
			return -1;                                                \
		return __real_syscall(number, a, b, c, d, e);                     \
	}

#define INJECT_SYSCALL(number, error, after) \
	(inject_syscall_number = (number), INJECT(syscall, error, after))

/* ---- the process ---- */

static MAYBE_UNUSED int count_fds(void)
{
	DIR *directory = opendir("/proc/self/fd");
	int count = 0;

	CHECK(directory);
	while (readdir(directory))
		count++;
	closedir(directory);
	return count;
}

/* False: not possible here, and why was said. */
static MAYBE_UNUSED bool have_pidfd(void)
{
	int fd = hu_pidfd_open(getpid());

	if (fd < 0)
		printf("nothing tested that needs pidfd_open: %s (valgrind 3.19 has none)\n",
		       strerror(errno));
	else
		close(fd);
	return fd >= 0;
}

static MAYBE_UNUSED void sleep_ms(int ms)
{
	struct timespec wait = hu_timespec(ms * MS);

	while (nanosleep(&wait, &wait) < 0 && errno == EINTR)
		;
}

static MAYBE_UNUSED int64_t in_ms(int ms)
{
	return hu_deadline_ns(ms * MS);
}

/* ---- guests: processes with threads that count, in cgroups of their own ---- */

#define GUESTS 3
#define THREADS 3

struct test_guest {
	char path[160];
	pid_t pid;
	_Atomic long *ticks; /* one for each thread */
	struct hu_guest core;
};

static char test_root[128]; /* our directory in the cgroup v2 hierarchy; "" where not possible */
static struct test_guest test_guests[GUESTS];

static MAYBE_UNUSED int write_text(const char *directory, const char *name, const char *text)
{
	char path[256];

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	ssize_t written = write(fd, text, strlen(text));
	int r = written < 0 ? -errno : 0;

	close(fd);
	return r;
}

static MAYBE_UNUSED int move_to(const char *cgroup, pid_t pid)
{
	char text[16];

	snprintf(text, sizeof(text), "%d", pid);
	return write_text(cgroup, "cgroup.procs", text);
}

/* Makes a cgroup of our own. False: not possible here, and why was said. */
static MAYBE_UNUSED bool root_make(void)
{
	static const char *const mounts[] = { "/sys/fs/cgroup", "/sys/fs/cgroup/unified" };

	for (size_t i = 0; i < 2; i++) {
		char probe[128];

		snprintf(probe, sizeof(probe), "%s/cgroup.controllers", mounts[i]);
		if (access(probe, F_OK) < 0)
			continue;
		snprintf(test_root, sizeof(test_root), "%s/hostupdate-test-%d", mounts[i],
			 getpid());
		if (mkdir(test_root, 0755) == 0)
			return true;
		printf("no cgroup for tests: %s: %s\n", test_root, strerror(errno));
		test_root[0] = '\0';
		return false;
	}
	printf("no cgroup for tests: no cgroup v2 is mounted\n");
	return false;
}

static MAYBE_UNUSED void *guest_thread(void *ticks)
{
	for (;;) {
		++*(_Atomic long *)ticks;
		usleep(1000);
	}
	return NULL;
}

static MAYBE_UNUSED void guest_start(struct test_guest *guest, int number)
{
	guest->ticks = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(guest->ticks != MAP_FAILED);
	guest->pid = fork();
	CHECK(guest->pid >= 0);
	if (guest->pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		prctl(PR_SET_NAME, "a) T (b"); /* what a parser of /proc must bear */
		for (int i = 1; i < THREADS; i++) {
			pthread_t thread;

			if (pthread_create(&thread, NULL, guest_thread, &guest->ticks[i]))
				_exit(1);
		}
		guest_thread(&guest->ticks[0]);
	}
	guest->core = (struct hu_guest){ -1, -1, -1, guest->pid };
	if (number < 0) { /* no cgroup */
		guest->core.pidfd = hu_pidfd_open(guest->pid);
		CHECK(guest->core.pidfd >= 0);
	} else {
		char path[800];

		snprintf(guest->path, sizeof(guest->path), "%s/guest%d", test_root, number);
		CHECK(mkdir(guest->path, 0755) == 0);
		CHECK_INT(move_to(guest->path, guest->pid), 0);
		snprintf(path, sizeof(path), "%s/cgroup.freeze", guest->path);
		guest->core.freeze_fd = open(path, O_RDWR | O_CLOEXEC);
		snprintf(path, sizeof(path), "%s/cgroup.events", guest->path);
		guest->core.events_fd = open(path, O_RDONLY | O_CLOEXEC);
		CHECK(guest->core.freeze_fd >= 0 && guest->core.events_fd >= 0);
	}
	for (int i = 0; i < THREADS; i++)
		while (guest->ticks[i] == 0)
			sleep_ms(1);
}

static MAYBE_UNUSED void guest_kill(struct test_guest *guest)
{
	if (guest->pid > 0) {
		kill(guest->pid, SIGKILL);
		waitpid(guest->pid, NULL, 0);
	}
	guest->pid = 0;
}

static MAYBE_UNUSED void guest_stop(struct test_guest *guest)
{
	guest_kill(guest);
	if (guest->core.freeze_fd >= 0)
		close(guest->core.freeze_fd);
	if (guest->core.events_fd >= 0)
		close(guest->core.events_fd);
	if (guest->core.pidfd >= 0)
		close(guest->core.pidfd);
	if (guest->path[0])
		for (int i = 0; i < 100 && rmdir(guest->path) < 0 && errno == EBUSY; i++)
			sleep_ms(1);
	if (guest->ticks)
		munmap(guest->ticks, 4096);
	memset(guest, 0, sizeof(*guest));
	guest->core = (struct hu_guest){ -1, -1, -1, 0 };
}

static MAYBE_UNUSED void guests_stop(void)
{
	for (int i = 0; i < GUESTS; i++)
		if (test_guests[i].ticks)
			guest_stop(&test_guests[i]);
}

static MAYBE_UNUSED void everything_stop(void)
{
	guests_stop();
	if (test_root[0])
		rmdir(test_root);
}

/* Starts GUESTS guests and fills core; cgroups: in one of its own each, else by pidfd. */
static MAYBE_UNUSED void guests_start(struct hu_guest *core, bool cgroups)
{
	for (int i = 0; i < GUESTS; i++) {
		guest_start(&test_guests[i], cgroups ? i : -1);
		core[i] = test_guests[i].core;
	}
}

static MAYBE_UNUSED bool guest_runs(const struct test_guest *guest)
{
	long before[THREADS];

	for (int i = 0; i < THREADS; i++)
		before[i] = guest->ticks[i];
	for (int wait = 0; wait < 500; wait++) {
		int moved = 0;

		for (int i = 0; i < THREADS; i++)
			moved += guest->ticks[i] != before[i];
		if (moved == THREADS)
			return true;
		sleep_ms(1);
	}
	return false;
}

static MAYBE_UNUSED bool guest_still(const struct test_guest *guest)
{
	long before[THREADS];

	for (int i = 0; i < THREADS; i++)
		before[i] = guest->ticks[i];
	sleep_ms(20);
	for (int i = 0; i < THREADS; i++)
		if (guest->ticks[i] != before[i])
			return false;
	return true;
}

#endif
