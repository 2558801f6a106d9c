// SPDX-License-Identifier: Apache-2.0
/*
 * The dead-man process, and how its parent, the orchestrator, speaks to it.
 *
 *   IDLE --ARM--> ARMED --deadline, or orchestrator gone--> FIRED
 *     ^--DISARM-----'                                         |
 *     '--DISARM: the orchestrator takes over------------------'
 *   IDLE --QUIT--> exit
 *   orchestrator gone, or FIRED and no answer in time (it is killed then) --> recovery, exit
 *
 * The parent has threads, so the child may only call what is async-signal-safe: no malloc, no
 * stdio, no dlsym behind one's back. (snprintf of integers is fine in glibc and musl.)
 */
#include <fcntl.h>
#include <inttypes.h>
#include <link.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "fault.h"
#include "internal.h"

/* How long a killed orchestrator may take to go; one in a hung system call never does. */
#define KILL_NS (5 * NS_PER_SECOND)

enum message_type {
	MESSAGE_READY,
	MESSAGE_FIRED,
	MESSAGE_ARM,
	MESSAGE_DISARM,
	MESSAGE_QUIT,
};

/* A request, and its answer with the same type and tag. READY and FIRED are unasked-for. */
struct message {
	uint32_t type; /* enum message_type */
	int32_t result; /* 0 or a count, or -errno */
	int64_t tag; /* tells an answer that comes too late from the one waited for */
	int64_t value; /* ARM: deadline_monotonic_ns; READY: bytes locked */
	int32_t lock_error; /* READY */
	uint32_t unused;
};

enum state {
	STATE_IDLE,
	STATE_ARMED,
	STATE_FIRED,
};

/* A loaded part of a program file. */
struct segment {
	uintptr_t start;
	size_t length;
};

struct keeper {
	const struct hu_keeper_config *config;
	struct segment code[16]; /* this file's object and the C library */
	size_t code_count;
	struct hu_wait *waits;
	struct pollfd *polls;
	int orchestrator; /* pidfd */
	int control;
	enum state state;
	bool hung_up; /* the orchestrator closed its end: it is dying, or lost */
	int64_t wake_monotonic_ns; /* the deadline, or the end of the grace */
};

/* ---- the child: small things ---- */

/* One line of the record, in one write. A record that cannot be written is no reason to stop. */
__attribute__((format(printf, 2, 3))) static void record(const struct keeper *keeper,
							 const char *format, ...)
{
	char line[160];
	va_list arguments;

	va_start(arguments, format);
	int length = vsnprintf(line, sizeof(line), format, arguments);
	va_end(arguments);
	if (TEMP_FAILURE_RETRY(write(keeper->config->record_fd, line, (size_t)length)) < 0)
		return;
}

static void tell(const struct keeper *keeper, struct message message)
{
	/* An orchestrator that does not read its messages must not hold up the keeper. */
	(void)TEMP_FAILURE_RETRY(
		send(keeper->control, &message, sizeof(message), MSG_DONTWAIT | MSG_NOSIGNAL));
}

static void write_file(const char *path, const char *text)
{
	cleanup_close int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || TEMP_FAILURE_RETRY(write(fd, text, strlen(text))) < 0)
		return;
}

/* Waits until the descriptor is readable. 0, -ETIMEDOUT or -errno. */
static int wait_readable(int fd, int64_t deadline_monotonic_ns)
{
	for (;;) {
		struct pollfd poll = { .fd = fd, .events = POLLIN };
		struct timespec wait = hu_timespec(deadline_monotonic_ns - hu_monotonic_ns());
		int ready = ppoll(&poll, 1, &wait, NULL);

		if (ready > 0)
			return 0;
		if (ready == 0)
			return -ETIMEDOUT;
		if (errno != EINTR)
			return -errno;
	}
}

/* ---- the child: becoming the keeper ---- */

static void reset_signals(bool ignore)
{
	for (int sig = 1; sig < _NSIG; sig++) {
		struct sigaction action = { .sa_handler = ignore ? SIG_IGN : SIG_DFL };

		switch (sig) {
		case SIGCHLD: /* ignored, its children could not be waited for */
		case SIGSEGV:
		case SIGBUS:
		case SIGFPE:
		case SIGILL:
		case SIGTRAP:
		case SIGSYS:
		case SIGABRT:
			action.sa_handler = SIG_DFL;
		}
		(void)sigaction(sig, &action, NULL); /* refused for SIGKILL and the C library's */
	}

	sigset_t none;

	sigemptyset(&none);
	(void)sigprocmask(SIG_SETMASK, &none, NULL);
}

/* Closes all descriptors but those; they are in ascending order and may repeat. */
static int keep_descriptors(const int32_t *keep, size_t count)
{
	unsigned int next = 0;

	for (size_t i = 0; i < count; i++) {
		if (keep[i] < 0)
			continue;
		unsigned int fd = (unsigned int)keep[i];

		if (fd > next && close_range(next, fd - 1, 0) < 0)
			return -errno;
		next = fd + 1;
	}
	if (close_range(next, ~0U, 0) < 0)
		return -errno;

	/* So that no file opened later becomes what a library takes for standard error. */
	for (;;) {
		int fd = open("/dev/null", O_RDWR | O_CLOEXEC);

		if (fd > STDERR_FILENO)
			close(fd);
		if (fd < 0 || fd > STDERR_FILENO)
			return 0;
	}
}

/* Locks guest RAM and the keeper's own pages. What cannot be had is told, and no failure. */
static void lock_memory(const struct keeper *keeper, struct message *ready)
{
	const struct hu_keeper_config *config = keeper->config;

	for (size_t i = 0; i < config->ram_count; i++) {
		struct hu_ram_lock lock = { 0 };
		int r = hu_ram_lock(config->ram_fds[i], &lock);

		if (r < 0 && ready->lock_error == 0)
			ready->lock_error = r;
		ready->value += (int64_t)lock.locked_bytes;
	}

	/*
	 * MCL_ONFAULT, so that neither the parent's pages are dragged in nor holes of guest RAM
	 * filled: only what is present, or will be touched, is locked. See mlockall(2).
	 */
	(void)mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT);

	/* Its code has to be present: the disk that it came from may be what hangs. */
	for (size_t i = 0; i < keeper->code_count; i++)
		(void)mlock((const void *)keeper->code[i].start, keeper->code[i].length);
}

static int become_keeper(const struct keeper *keeper, const int32_t *keep, size_t keep_count)
{
	const struct hu_keeper_config *config = keeper->config;

	reset_signals(true);
	(void)setsid();
	(void)prctl(PR_SET_NAME, "hu-keeper");
	int r = keep_descriptors(keep, keep_count);
	if (r < 0)
		return r;
	if (chdir("/") < 0) /* or it would pin a file system that the update wants to unmount */
		return -errno;

	/* The rest is as good as the host allows. */
	write_file("/proc/self/oom_score_adj", "-1000");
	const struct sched_param lowest = { .sched_priority = 1 };
	(void)sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &lowest);
	if (config->cgroup_procs_fd >= 0)
		(void)!TEMP_FAILURE_RETRY(write(config->cgroup_procs_fd, "0", 1));
	return 0;
}

/* ---- the child: its duty ---- */

static void record_thaw(const struct keeper *keeper)
{
	const struct hu_wait *waits = keeper->waits;

	for (size_t i = 0; i < keeper->config->guest_count; i++)
		record(keeper, "thawed %" PRId64 " guest=%zu requested=%" PRId64 " error=%d\n",
		       waits[i].stamp.settled_monotonic_ns, i,
		       waits[i].stamp.requested_monotonic_ns, waits[i].error);
	(void)fdatasync(keeper->config->record_fd);
}

/* Lets all guests run: that first, everything else later. */
static void fire(struct keeper *keeper, const char *reason)
{
	const struct hu_keeper_config *config = keeper->config;
	int64_t fired_ns = hu_monotonic_ns();

	hu_guests_ask(config->guests, config->guest_count, false, keeper->waits);
	tell(keeper, (struct message){ .type = MESSAGE_FIRED });
	hu_guests_settle(config->guests, config->guest_count, false,
			 hu_deadline_ns(config->settle_ns), keeper->waits, keeper->polls);
	record(keeper, "fired %" PRId64 " reason=%s\n", fired_ns, reason);
	record_thaw(keeper);
	keeper->state = STATE_FIRED;
	keeper->wake_monotonic_ns = hu_deadline_ns(keeper->config->grace_ns);
}

/* An orchestrator that lived on after the firing may have stopped guests since. */
static void let_run_again(struct keeper *keeper)
{
	const struct hu_keeper_config *config = keeper->config;
	bool stopped = false;

	for (size_t i = 0; i < config->guest_count; i++)
		stopped |= hu_guest_frozen(&config->guests[i]) > 0;
	/* Asked in any case: one that is just being stopped does not say so yet. */
	hu_guests_ask(config->guests, config->guest_count, false, keeper->waits);
	hu_guests_settle(config->guests, config->guest_count, false,
			 hu_deadline_ns(config->settle_ns), keeper->waits, keeper->polls);
	if (stopped)
		record_thaw(keeper);
}

static _Noreturn void become_recovery(const struct hu_keeper_config *config)
{
	int null = open("/dev/null", O_RDONLY | O_CLOEXEC);

	(void)dup2(null, STDIN_FILENO);
	(void)dup2(config->recovery_log_fd, STDOUT_FILENO);
	(void)dup2(config->recovery_log_fd, STDERR_FILENO);
	(void)close_range(STDERR_FILENO + 1, ~0U, 0);
	(void)setsid();
	write_file("/proc/self/oom_score_adj", "0");
	reset_signals(false);
	/* Normal scheduling: SCHED_RESET_ON_FORK saw to it. Memory locks are not inherited. */
	execve(config->recovery_argv[0], config->recovery_argv, config->recovery_envp);
	_exit(127);
}

static pid_t fork_quietly(void)
{
#if defined(__GLIBC__) && !__GLIBC_PREREQ(2, 34)
	return (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
#else
	return _Fork(); /* fork() without the handlers that libraries have registered */
#endif
}

static void recover(const struct keeper *keeper)
{
	const struct hu_keeper_config *config = keeper->config;

	if (!config->recovery_argv)
		return;

	pid_t pid = fork_quietly();

	if (pid == 0)
		become_recovery(config);
	record(keeper, "recovery-started %" PRId64 " pid=%d\n", hu_monotonic_ns(), pid);
	if (pid < 0) {
		/* As a shell says it of a command that it could not start. */
		record(keeper, "recovery-ended %" PRId64 " status=126\n", hu_monotonic_ns());
		return;
	}

	cleanup_close int pidfd = hu_pidfd_open(pid);
	int r = pidfd < 0 ? -errno : wait_readable(pidfd, hu_deadline_ns(config->recovery_ns));
	int status;

	if (r < 0 || TEMP_FAILURE_RETRY(waitpid(pid, &status, 0)) < 0) {
		record(keeper, "recovery-left %" PRId64 " pid=%d\n", hu_monotonic_ns(), pid);
		return;
	}
	record(keeper, "recovery-ended %" PRId64 " status=%d\n", hu_monotonic_ns(),
	       WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
}

static _Noreturn void end(const struct keeper *keeper)
{
	(void)fdatasync(keeper->config->record_fd);
	_exit(0);
}

/* The orchestrator is dead, or has forfeited its life. */
static _Noreturn void take_over(struct keeper *keeper)
{
	if (keeper->state != STATE_FIRED) {
		(void)hu_fault("core.keeper.fire");
		fire(keeper, "orchestrator-gone");
	} else {
		if (wait_readable(keeper->orchestrator, 0) < 0) {
			(void)hu_pidfd_send_signal(keeper->orchestrator, SIGKILL);
			int r = wait_readable(keeper->orchestrator, hu_deadline_ns(KILL_NS));
			record(keeper, "orchestrator-killed %" PRId64 " error=%d\n",
			       hu_monotonic_ns(), r);
		}
		let_run_again(keeper);
	}
	(void)hu_fault("core.keeper.recover");
	recover(keeper);
	end(keeper);
}

/* Takes one message. */
static void hear(struct keeper *keeper)
{
	struct message message;
	ssize_t length = recv(keeper->control, &message, sizeof(message), MSG_DONTWAIT);

	if (length < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (length != sizeof(message)) {
		/*
		 * Closed. A process that dies closes its files just before its pidfd tells
		 * (exit_files and exit_notify in the kernel's do_exit), so do not wait for that.
		 */
		keeper->hung_up = true;
		if (keeper->state == STATE_ARMED)
			fire(keeper, "orchestrator-gone");
		else if (keeper->state == STATE_IDLE)
			keeper->wake_monotonic_ns = hu_deadline_ns(keeper->config->grace_ns);
		return;
	}

	int64_t now_ns = hu_monotonic_ns();
	enum state before = keeper->state;

	switch ((enum message_type)message.type) {
	case MESSAGE_ARM:
		message.result = before == STATE_IDLE ? 0 : -EALREADY;
		if (before == STATE_IDLE) {
			/* Recorded first: while armed the keeper writes nothing that may hang. */
			record(keeper, "armed %" PRId64 " deadline=%" PRId64 "\n", now_ns,
			       message.value);
			keeper->wake_monotonic_ns = message.value;
			keeper->state = STATE_ARMED;
		}
		tell(keeper, message);
		break;
	case MESSAGE_DISARM:
		message.result = before == STATE_FIRED;
		keeper->state = STATE_IDLE;
		tell(keeper, message);
		record(keeper, "disarmed %" PRId64 "\n", now_ns);
		break;
	case MESSAGE_QUIT:
		message.result = before == STATE_IDLE ? 0 : -EBUSY;
		tell(keeper, message);
		if (before == STATE_IDLE) {
			record(keeper, "quit %" PRId64 "\n", now_ns);
			_exit(0);
		}
		break;
	case MESSAGE_READY:
	case MESSAGE_FIRED:
		break;
	}
}

static _Noreturn void keep(struct keeper *keeper)
{
	for (;;) {
		struct pollfd polls[] = {
			{ .fd = keeper->orchestrator, .events = POLLIN },
			{ .fd = keeper->hung_up ? -1 : keeper->control, .events = POLLIN },
		};
		bool timed = keeper->state != STATE_IDLE || keeper->hung_up;
		struct timespec wait = hu_timespec(keeper->wake_monotonic_ns - hu_monotonic_ns());

		(void)ppoll(polls, 2, timed ? &wait : NULL, NULL);
		/* What the orchestrator said before it died, or before the deadline, counts. */
		if (polls[1].revents) {
			hear(keeper);
			continue;
		}
		if (polls[0].revents)
			take_over(keeper);

		timed = keeper->state != STATE_IDLE || keeper->hung_up;
		if (!timed || hu_monotonic_ns() < keeper->wake_monotonic_ns)
			continue;
		if (keeper->state == STATE_ARMED) {
			fire(keeper, "deadline");
		} else if (keeper->state == STATE_FIRED) {
			take_over(keeper);
		} else {
			/* Let go by an orchestrator that lives, with nothing stopped. */
			record(keeper, "quit %" PRId64 "\n", hu_monotonic_ns());
			end(keeper);
		}
	}
}

static _Noreturn void child(struct keeper *keeper, const int32_t *keep_fds, size_t keep_count)
{
	struct message ready = { .type = MESSAGE_READY };

	ready.result = become_keeper(keeper, keep_fds, keep_count);
	if (ready.result == 0)
		ready.result = hu_fault("core.keeper.ready");
	if (ready.result == 0) {
		lock_memory(keeper, &ready);
		record(keeper, "ready %" PRId64 " pid=%d locked_bytes=%" PRId64 " lock_error=%d\n",
		       hu_monotonic_ns(), getpid(), ready.value, ready.lock_error);
	}
	tell(keeper, ready);
	if (ready.result < 0)
		_exit(1);
	keep(keeper);
}

/* ---- the parent ---- */

/* Waits for the answer; messages of another type or tag are passed over. */
static int answer(int control_fd, enum message_type type, int64_t tag,
		  int64_t deadline_monotonic_ns, struct message *ret_message)
{
	for (;;) {
		struct message message;
		int r = wait_readable(control_fd, deadline_monotonic_ns);

		if (r < 0)
			return r;
		ssize_t length = recv(control_fd, &message, sizeof(message), MSG_DONTWAIT);

		if (length < 0 && errno != EAGAIN && errno != EINTR)
			return errno == ECONNRESET ? -EPIPE : -errno;
		if (length == 0)
			return -EPIPE;
		if (length == sizeof(message) && message.type == type && message.tag == tag) {
			*ret_message = message;
			return 0;
		}
	}
}

/* Sends a request and waits for its answer. Returns the result in it. */
static int ask(int control_fd, enum message_type type, int64_t value, int64_t timeout_ns)
{
	struct message message = { .type = type, .tag = hu_monotonic_ns(), .value = value };

	if (TEMP_FAILURE_RETRY(
		    send(control_fd, &message, sizeof(message), MSG_DONTWAIT | MSG_NOSIGNAL)) < 0) {
		if (errno == EAGAIN) /* it has not read what was sent before */
			return -ETIMEDOUT;
		return errno == ECONNRESET ? -EPIPE : -errno;
	}

	int r = answer(control_fd, type, message.tag, hu_deadline_ns(timeout_ns), &message);
	return r < 0 ? r : message.result;
}

static int by_number(const void *left, const void *right)
{
	int32_t a = *(const int32_t *)left;
	int32_t b = *(const int32_t *)right;

	return (a > b) - (a < b);
}

/* All descriptors that the keeper keeps, ascending. Returns how many. */
static size_t list_descriptors(const struct keeper *keeper, int32_t *fds)
{
	const struct hu_keeper_config *config = keeper->config;
	size_t count = 0;

	for (size_t i = 0; i < config->guest_count; i++) {
		fds[count++] = config->guests[i].freeze_fd;
		fds[count++] = config->guests[i].events_fd;
		fds[count++] = config->guests[i].pidfd;
	}
	for (size_t i = 0; i < config->ram_count; i++)
		fds[count++] = config->ram_fds[i];
	fds[count++] = keeper->orchestrator;
	fds[count++] = keeper->control;
	fds[count++] = config->record_fd;
	fds[count++] = config->cgroup_procs_fd;
	fds[count++] = config->recovery_log_fd;
	qsort(fds, count, sizeof(*fds), by_number);
	return count;
}

/* Adds the object's segments if it holds code that the keeper runs. */
static int add_object(struct dl_phdr_info *info, size_t size, void *data)
{
	struct keeper *keeper = data;
	const uintptr_t used[] = { (uintptr_t)&keep, (uintptr_t)&ppoll };
	const size_t room = sizeof(keeper->code) / sizeof(*keeper->code);
	size_t count = keeper->code_count;
	bool wanted = false;

	(void)size;
	for (size_t i = 0; i < info->dlpi_phnum && count < room; i++) {
		const ElfW(Phdr) *header = &info->dlpi_phdr[i];
		uintptr_t start = info->dlpi_addr + header->p_vaddr;

		if (header->p_type != PT_LOAD)
			continue;
		wanted |= used[0] - start < header->p_memsz || used[1] - start < header->p_memsz;
		keeper->code[count++] = (struct segment){ start, header->p_memsz };
	}
	if (wanted)
		keeper->code_count = count;
	return 0;
}

#define ANCHOR_STACK_SIZE 16384

/*
 * A process that shares the orchestrator's memory and does nothing. A pidfd tells of a death when
 * the dying process is done with its memory (exit_mm before exit_notify in the kernel's do_exit):
 * 4 ms for 100 MB, and in proportion. While the anchor has the memory too, the dying one merely
 * lets go of it; the anchor ends next and gives it back, with nobody waiting.
 *
 * It shares the caller's thread-local variables as well, so it must not fail a call (errno), nor be
 * instrumented.
 */
__attribute__((no_sanitize("address", "undefined"))) static int anchor(void *argument)
{
	struct pollfd *orchestrator = argument;
	unsigned int fd = (unsigned int)orchestrator->fd;

	/* Its own copy of the descriptors; it would hold on to files and locks. */
	if (fd > 0)
		syscall(SYS_close_range, 0, fd - 1, 0);
	syscall(SYS_close_range, fd + 1, ~0U, 0);
	syscall(SYS_prctl, PR_SET_NAME, "hu-anchor", 0, 0, 0);
	syscall(SYS_ppoll, orchestrator, 1, NULL, NULL, 0); /* all signals are blocked */
	syscall(SYS_exit_group, 0);
	return 0;
}

static void anchor_stop(const struct hu_keeper *keeper)
{
	if (keeper->anchor_pid <= 0)
		return;
	kill(keeper->anchor_pid, SIGKILL);
	(void)TEMP_FAILURE_RETRY(waitpid(keeper->anchor_pid, NULL, __WALL));
	munmap(keeper->anchor_stack, ANCHOR_STACK_SIZE);
}

/* Best effort: without it the keeper learns of a death a little later. */
static void anchor_start(int orchestrator, struct hu_keeper *keeper)
{
	char *stack = mmap(NULL, ANCHOR_STACK_SIZE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
	if (stack == MAP_FAILED)
		return;
	/* Its argument is at the bottom of its stack, which it never reaches. */
	struct pollfd *argument = (void *)stack;

	*argument = (struct pollfd){ .fd = orchestrator, .events = POLLIN };

	sigset_t all, before;

	sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &before);
	/* Without a signal at its end: it is nobody's business but ours. */
	keeper->anchor_pid = clone(anchor, stack + ANCHOR_STACK_SIZE, CLONE_VM, argument);
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	keeper->anchor_stack = stack;
	if (keeper->anchor_pid < 0)
		munmap(stack, ANCHOR_STACK_SIZE);
}

int hu_keeper_start(const struct hu_keeper_config *config, int64_t timeout_ns,
		    struct hu_keeper *ret_keeper)
{
	int64_t deadline_ns = hu_deadline_ns(timeout_ns);
	int pair[2];

	/* Opened before the fork: nobody can miss the death of an orchestrator that it names. */
	cleanup_close int orchestrator = hu_pidfd_open(getpid());
	if (orchestrator < 0)
		return -errno;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return -errno;
	cleanup_close int control = pair[0];
	cleanup_close int control_of_child = pair[1];

	/* The child's memory: it allocates none of its own. (+ 1: calloc(0) may return NULL.) */
	cleanup_free struct hu_wait *waits = calloc(config->guest_count + 1, sizeof(*waits));
	cleanup_free struct pollfd *polls = calloc(config->guest_count + 1, sizeof(*polls));
	cleanup_free int32_t *fds =
		calloc(3 * config->guest_count + config->ram_count + 5, sizeof(*fds));
	if (!waits || !polls || !fds)
		return -ENOMEM;

	struct keeper keeper = {
		.config = config,
		.waits = waits,
		.polls = polls,
		.orchestrator = orchestrator,
		.control = control_of_child,
	};
	size_t fd_count = list_descriptors(&keeper, fds);

	(void)dl_iterate_phdr(add_object, &keeper);

	/* The parent's handlers must not run in the child. */
	sigset_t all, before;

	sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &before);
	pid_t pid = fork_quietly();

	if (pid == 0)
		child(&keeper, fds, fd_count);
	int r = pid < 0 ? -errno : 0;
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (r < 0)
		return r;

	/* So that the keeper's death closes the last copy, and is seen. */
	close(control_of_child);
	control_of_child = -1;

	struct message ready;
	cleanup_close int pidfd = hu_pidfd_open(pid);

	if (pidfd < 0)
		r = -errno;
	if (r == 0)
		r = answer(control, MESSAGE_READY, 0, deadline_ns, &ready);
	if (r == 0)
		r = ready.result;
	if (r < 0) {
		kill(pid, SIGKILL); /* not waited for yet, so the number is still its own */
		(void)TEMP_FAILURE_RETRY(waitpid(pid, NULL, 0));
		return r;
	}

	*ret_keeper = (struct hu_keeper){
		.pid = pid,
		.pidfd = pidfd,
		.control_fd = control,
		.locked_bytes = (uint64_t)ready.value,
		.lock_error = ready.lock_error,
	};
	anchor_start(orchestrator, ret_keeper);
	pidfd = control = -1;
	return 0;
}

int hu_keeper_arm(int32_t control_fd, int64_t deadline_monotonic_ns, int64_t timeout_ns)
{
	int r = ask(control_fd, MESSAGE_ARM, deadline_monotonic_ns, timeout_ns);

	/* It may hear the request later; it then hears this right after. */
	if (r == -ETIMEDOUT)
		(void)ask(control_fd, MESSAGE_DISARM, 0, 0);
	return r;
}

int hu_keeper_disarm(int32_t control_fd, int64_t timeout_ns)
{
	return ask(control_fd, MESSAGE_DISARM, 0, timeout_ns);
}

int hu_keeper_stop(const struct hu_keeper *keeper, int64_t timeout_ns)
{
	int64_t deadline_ns = hu_deadline_ns(timeout_ns);
	int r = ask(keeper->control_fd, MESSAGE_QUIT, 0, timeout_ns);

	if (r < 0 && r != -EPIPE)
		return r;
	int waited = wait_readable(keeper->pidfd, deadline_ns);
	if (waited < 0)
		return waited;
	/* Somebody may have waited for all children already. */
	(void)TEMP_FAILURE_RETRY(waitpid(keeper->pid, NULL, 0));
	anchor_stop(keeper);
	return r;
}
