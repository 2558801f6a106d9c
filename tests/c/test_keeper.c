// SPDX-License-Identifier: Apache-2.0
/* WRAP: syscall socketpair calloc _Fork close_range chdir send recv ppoll write mmap clone */
/* WRAP: hu_ram_lock */
#include <sys/socket.h>

#include "test.h"

WRAP_SYSCALL
WRAPPER(int, -1, socketpair, (int domain, int type, int protocol, int *pair),
	(domain, type, protocol, pair))
WRAPPER(void *, NULL, calloc, (size_t count, size_t size), (count, size))
WRAPPER(pid_t, -1, _Fork, (void), ())
WRAPPER(int, -1, close_range, (unsigned int first, unsigned int last, int flags),
	(first, last, flags))
WRAPPER(int, -1, chdir, (const char *path), (path))
WRAPPER(ssize_t, -1, send, (int fd, const void *data, size_t size, int flags),
	(fd, data, size, flags))
WRAPPER(ssize_t, -1, recv, (int fd, void *data, size_t size, int flags), (fd, data, size, flags))
WRAPPER(int, -1, ppoll,
	(struct pollfd * fds, nfds_t count, const struct timespec *wait, const sigset_t *mask),
	(fds, count, wait, mask))
WRAPPER(ssize_t, -1, write, (int fd, const void *data, size_t size), (fd, data, size))
WRAPPER(void *, MAP_FAILED, mmap,
	(void *address, size_t size, int protection, int flags, int fd, off_t offset),
	(address, size, protection, flags, fd, offset))
WRAPPER(int, -1, clone, (int (*run)(void *), void *stack, int flags, void *argument),
	(run, stack, flags, argument))

/* Guest RAM is the business of test_ram.c. Here: 4096 bytes, or an error, or for ever. */
static int fake_lock_error;
static bool fake_lock_hangs;

int __wrap_hu_ram_lock(int32_t fd, struct hu_ram_lock *ret_lock);

int __wrap_hu_ram_lock(int32_t fd, struct hu_ram_lock *ret_lock)
{
	if (fake_lock_hangs)
		pause();
	if (fake_lock_error && fd == 1)
		return fake_lock_error;
	ret_lock->locked_bytes = 4096;
	return 0;
}

#define WAIT_NS (10 * NS_PER_SECOND)

static struct hu_guest guests[GUESTS];
static int record_fd = -1, log_fd = -1;
static struct hu_keeper_config config;
static struct hu_keeper keeper;
static char text[16384]; /* the record, or the log, as last read */

static int temporary_file(void)
{
	char path[] = "/tmp/hostupdate-test-XXXXXX";
	int fd = mkostemp(path, O_CLOEXEC | O_APPEND);

	CHECK(fd >= 0);
	unlink(path);
	return fd;
}

static char *arguments[] = { NULL, NULL, NULL, NULL };
static char *environment[] = { NULL, NULL };
static char shell[] = "/bin/sh", dash_c[] = "-c", variable[] = "HU_TEST=here";

/* script: the recovery command; NULL: none. */
static void configure(const char *script)
{
	if (record_fd >= 0) {
		close(record_fd);
		close(log_fd);
	}
	record_fd = temporary_file();
	log_fd = temporary_file();
	arguments[0] = shell;
	arguments[1] = dash_c;
	free(arguments[2]);
	arguments[2] = script ? strdup(script) : NULL;
	environment[0] = variable;
	config = (struct hu_keeper_config){
		.guests = guests,
		.guest_count = test_guests[0].pid ? GUESTS : 0,
		.grace_ns = 100 * MS,
		.settle_ns = 1000 * MS,
		.recovery_ns = WAIT_NS,
		.record_fd = record_fd,
		.cgroup_procs_fd = -1,
		.recovery_log_fd = log_fd,
		.recovery_argv = script ? arguments : NULL,
		.recovery_envp = environment,
	};
}

static const char *read_back(int fd)
{
	ssize_t length = pread(fd, text, sizeof(text) - 1, 0);

	CHECK(length >= 0);
	text[length] = '\0';
	return text;
}

/* How many lines of the record begin with that. */
static int lines(const char *event)
{
	int count = 0;

	read_back(record_fd);
	for (const char *line = text; *line; line = strchr(line, '\n') + 1)
		count += strncmp(line, event, strlen(event)) == 0 && line[strlen(event)] == ' ';
	return count;
}

/* The number after that key in the first line of that event. */
static long long number(const char *event, const char *key)
{
	read_back(record_fd);
	for (const char *line = text; *line; line = strchr(line, '\n') + 1) {
		if (strncmp(line, event, strlen(event)) != 0 || line[strlen(event)] != ' ')
			continue;
		if (!key)
			return atoll(line + strlen(event));
		const char *field = strstr(line, key);

		CHECK(field && field < strchr(line, '\n'));
		return atoll(field + strlen(key) + 1);
	}
	fprintf(stderr, "no line \"%s\" in:\n%s", event, text);
	CHECK(false);
	return 0;
}

static void read_proc(pid_t pid, const char *file)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, file);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	CHECK(fd >= 0);
	ssize_t length = read(fd, text, sizeof(text) - 1);

	CHECK(length >= 0);
	text[length] = '\0';
	close(fd);
}

static int count_fds_of(pid_t pid)
{
	char path[64];
	int count = 0;

	snprintf(path, sizeof(path), "/proc/%d/fd", pid);
	DIR *directory = opendir(path);

	CHECK(directory);
	for (struct dirent *entry; (entry = readdir(directory));)
		count += entry->d_name[0] != '.';
	closedir(directory);
	return count;
}

static bool readable(int fd, int ms)
{
	struct pollfd poll_fd = { .fd = fd, .events = POLLIN };

	return poll(&poll_fd, 1, ms) == 1;
}

static void start(void)
{
	CHECK_INT(hu_keeper_start(&config, WAIT_NS, &keeper), 0);
}

static void stop(void)
{
	CHECK_INT(hu_keeper_stop(&keeper, WAIT_NS), 0);
	close(keeper.control_fd);
	close(keeper.pidfd);
}

static int wait_for(pid_t pid)
{
	int status;

	CHECK_INT(waitpid(pid, &status, __WALL), pid);
	return status;
}

/* No child is left, not even a zombie, but the guests. */
static void check_no_children(void)
{
	for (int i = 0; i < GUESTS; i++)
		guest_kill(&test_guests[i]);
	CHECK_INT(waitpid(-1, NULL, WNOHANG | __WALL), -1);
	CHECK_INT(errno, ECHILD);
	guests_stop();
}

/* ---- an orchestrator that can be killed ---- */

struct orchestrator {
	pid_t pid, keeper_pid, anchor_pid;
};

enum behaviour {
	WAITS = 0,
	ARMS = 1,
	STOPS_GUESTS = 2,
	STOPS_GUESTS_AGAIN = 4, /* after the keeper fired */
	HANGS_UP = 8,
	ENDS = 16,
	FAULTY_KEEPER = 32, /* errors are injected in the keeper alone */
};

/* Starts one that starts a keeper, behaves so and then does nothing any more. */
static struct orchestrator orchestrator_start(int behaviour, int deadline_ms)
{
	struct orchestrator orchestrator = { 0 };
	int pipe_fds[2];

	CHECK(pipe2(pipe_fds, O_CLOEXEC) == 0);
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		test_cleanup = NULL;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (behaviour & FAULTY_KEEPER)
			inject_not_in = getpid();
		start();
		if (behaviour & ARMS)
			CHECK_INT(hu_keeper_arm(keeper.control_fd, in_ms(deadline_ms), WAIT_NS), 0);
		struct hu_stamp stamps[GUESTS];

		if (behaviour & STOPS_GUESTS)
			CHECK_INT(hu_guests_freeze(guests, GUESTS, in_ms(5000), stamps, NULL), 0);
		orchestrator = (struct orchestrator){ getpid(), keeper.pid, keeper.anchor_pid };
		CHECK(write(pipe_fds[1], &orchestrator, sizeof(orchestrator)) > 0);
		if (behaviour & STOPS_GUESTS_AGAIN) {
			CHECK(readable(keeper.control_fd, 5000));
			CHECK_INT(hu_guests_freeze(guests, GUESTS, in_ms(5000), stamps, NULL), 0);
		}
		if (behaviour & HANGS_UP)
			close(keeper.control_fd);
		if (behaviour & ENDS)
			_exit(0);
		for (;;)
			pause();
	}
	close(pipe_fds[1]);
	CHECK_INT(read(pipe_fds[0], &orchestrator, sizeof(orchestrator)), sizeof(orchestrator));
	close(pipe_fds[0]);
	return orchestrator;
}

/* It ends by that signal (0: by itself); then the keeper ends well, and the anchor. */
static void orchestrator_ends(const struct orchestrator *orchestrator, int sig)
{
	int status = wait_for(orchestrator->pid);

	CHECK_INT(WIFSIGNALED(status) ? WTERMSIG(status) : 0, sig);
	CHECK_INT(wait_for(orchestrator->keeper_pid), 0);
	if (orchestrator->anchor_pid > 0)
		CHECK_INT(wait_for(orchestrator->anchor_pid), 0);
}

static void check_all_run(void)
{
	for (int i = 0; i < GUESTS; i++) {
		CHECK_INT(hu_guest_frozen(&guests[i]), 0);
		CHECK(guest_runs(&test_guests[i]));
	}
}

/* Whether this process may have the lowest OOM score (CAP_SYS_RESOURCE). */
static bool may_be_spared(void)
{
	pid_t pid = fork();

	if (pid == 0)
		_exit(write_text("/proc/self", "oom_score_adj", "-1000") < 0);
	return wait_for(pid) == 0;
}

/* ---- the life of a keeper ---- */

static void lives_and_ends(bool cgroups)
{
	guests_start(guests, cgroups);
	configure("true");
	int fds = count_fds();
	const int32_t ram[] = { 0, 1 };

	config.ram_fds = ram;
	config.ram_count = 2;
	start();
	CHECK_INT(keeper.locked_bytes, 2 * 4096);
	CHECK_INT(keeper.lock_error, 0);
	CHECK(fcntl(keeper.control_fd, F_GETFD) & FD_CLOEXEC);
	CHECK(fcntl(keeper.pidfd, F_GETFD) & FD_CLOEXEC);

	/* It has its own descriptors only: files of guests, 0 to 2, pidfd, control, record, log. */
	CHECK_INT(count_fds_of(keeper.pid), GUESTS * (cgroups ? 2 : 1) + 3 + 4);
	read_proc(keeper.pid, "comm");
	CHECK(strcmp(text, "hu-keeper\n") == 0);
	CHECK_INT(getsid(keeper.pid), keeper.pid);
	if (may_be_spared()) {
		read_proc(keeper.pid, "oom_score_adj");
		CHECK(strcmp(text, "-1000\n") == 0);
	}
	if (keeper.anchor_pid > 0) {
		for (int i = 0; i < 1000 && count_fds_of(keeper.anchor_pid) > 1; i++)
			sleep_ms(1);
		CHECK_INT(count_fds_of(keeper.anchor_pid), 1);
	}

	/* What ends others does not end it. */
	const int deadly[] = { SIGTERM, SIGHUP,	 SIGINT,  SIGQUIT, SIGPIPE,
			       SIGUSR1, SIGALRM, SIGTSTP, SIGPROF, SIGRTMIN + 3 };

	for (size_t i = 0; i < sizeof(deadly) / sizeof(*deadly); i++)
		CHECK(kill(keeper.pid, deadly[i]) == 0);

	for (int i = 0; i < 3; i++) {
		CHECK_INT(hu_keeper_arm(keeper.control_fd, in_ms(60000), WAIT_NS), 0);
		CHECK_INT(hu_keeper_arm(keeper.control_fd, in_ms(60000), WAIT_NS), -EALREADY);
		CHECK_INT(hu_keeper_stop(&keeper, WAIT_NS), -EBUSY);
		CHECK_INT(hu_keeper_disarm(keeper.control_fd, WAIT_NS), 0);
		CHECK_INT(hu_keeper_disarm(keeper.control_fd, WAIT_NS), 0);
	}
	CHECK(!readable(keeper.control_fd, 0));
	stop();
	CHECK_INT(lines("ready"), 1);
	CHECK_INT(lines("armed"), 3);
	CHECK_INT(lines("disarmed"), 6);
	CHECK_INT(lines("fired") + lines("recovery-started"), 0);
	CHECK_INT(lines("quit"), 1);
	CHECK_INT(number("ready", "pid"), keeper.pid);
	CHECK_INT(number("ready", "locked_bytes"), 2 * 4096);
	CHECK_INT(count_fds(), fds);
	check_no_children();
}

static void fires_at_the_deadline_and_hands_over(bool cgroups)
{
	struct hu_stamp stamps[GUESTS];

	guests_start(guests, cgroups);
	configure("exit 9");
	config.grace_ns = WAIT_NS;
	start();
	int64_t deadline_ns = in_ms(60);

	CHECK_INT(hu_keeper_arm(keeper.control_fd, deadline_ns, WAIT_NS), 0);
	CHECK_INT(hu_guests_freeze(guests, GUESTS, deadline_ns, stamps, NULL), 0);
	CHECK(readable(keeper.control_fd, 5000));
	CHECK(hu_monotonic_ns() >= deadline_ns);
	check_all_run();

	/* Until it is answered it is neither armed nor stopped. */
	CHECK_INT(hu_keeper_arm(keeper.control_fd, in_ms(60000), WAIT_NS), -EALREADY);
	CHECK_INT(hu_keeper_stop(&keeper, WAIT_NS), -EBUSY);
	CHECK_INT(hu_keeper_disarm(keeper.control_fd, WAIT_NS), 1);
	CHECK_INT(hu_keeper_disarm(keeper.control_fd, WAIT_NS), 0);

	CHECK_INT(hu_keeper_arm(keeper.control_fd, in_ms(60000), WAIT_NS), 0);
	CHECK_INT(hu_keeper_disarm(keeper.control_fd, WAIT_NS), 0);
	stop();

	CHECK(strstr(read_back(record_fd), "reason=deadline\n"));
	CHECK_INT(lines("fired"), 1);
	CHECK_INT(lines("thawed"), GUESTS);
	CHECK_INT(number("thawed", "error"), 0);
	CHECK(number("thawed", "requested") >= deadline_ns);
	CHECK(number("thawed", NULL) < deadline_ns + 500 * MS);
	CHECK_INT(lines("recovery-started") + lines("orchestrator-killed"), 0);
	check_no_children();
}

static void kills_who_does_not_answer(void)
{
	guests_start(guests, true);
	configure("exit 7");
	struct orchestrator silent = orchestrator_start(ARMS | STOPS_GUESTS, 50);

	orchestrator_ends(&silent, SIGKILL);
	check_all_run();
	CHECK(strstr(read_back(record_fd), "reason=deadline\n"));
	CHECK(number("orchestrator-killed", NULL) >= number("fired", NULL) + config.grace_ns);
	CHECK_INT(number("orchestrator-killed", "error"), 0);
	CHECK_INT(number("recovery-ended", "status"), 7);
	CHECK_INT(lines("thawed"), GUESTS);

	/* One that stops guests after it was told is undone. */
	configure("exit 0");
	silent = orchestrator_start(ARMS | STOPS_GUESTS | STOPS_GUESTS_AGAIN, 50);
	orchestrator_ends(&silent, SIGKILL);
	check_all_run();
	CHECK_INT(lines("thawed"), 2 * GUESTS);
	CHECK_INT(number("recovery-ended", "status"), 0);
	check_no_children();
}

static void outlives_the_orchestrator(bool cgroups)
{
	guests_start(guests, cgroups);
	configure("echo $HU_TEST; echo problem >&2; wc -c; ls /proc/self/fd | wc -l;"
		  "cat /proc/self/oom_score_adj; ulimit -l >/dev/null; pwd");
	struct orchestrator victim = orchestrator_start(ARMS | STOPS_GUESTS, 60000);

	for (int i = 0; i < GUESTS; i++)
		CHECK_INT(hu_guest_frozen(&guests[i]), 1);
	int64_t killed_ns = hu_monotonic_ns();

	CHECK(kill(victim.pid, SIGKILL) == 0);
	orchestrator_ends(&victim, SIGKILL);
	check_all_run();
	CHECK(strstr(read_back(record_fd), "reason=orchestrator-gone\n"));
	CHECK_INT(lines("orchestrator-killed"), 0);
	CHECK_INT(lines("thawed"), GUESTS);
	CHECK(number("thawed", NULL) < killed_ns + 1000 * MS);
	CHECK_INT(number("recovery-ended", "status"), 0);
	/* standard input is empty, and ls has 0 to 2 and its directory open */
	CHECK(strcmp(read_back(log_fd), "here\nproblem\n0\n4\n0\n/\n") == 0);

	/* It ends in peace, but without a word: the same. */
	configure("exit 0");
	victim = orchestrator_start(ARMS | STOPS_GUESTS | ENDS, 60000);
	orchestrator_ends(&victim, 0);
	check_all_run();
	CHECK(strstr(read_back(record_fd), "reason=orchestrator-gone\n"));
	check_no_children();
}

static void recovers_from_a_death_before_arming(void)
{
	configure("kill -9 $$");
	struct orchestrator victim = orchestrator_start(WAITS, 0);

	CHECK(kill(victim.pid, SIGKILL) == 0);
	orchestrator_ends(&victim, SIGKILL);
	CHECK_INT(lines("fired"), 1);
	CHECK_INT(number("recovery-ended", "status"), -SIGKILL);
	CHECK_INT(number("recovery-ended", NULL) > number("recovery-started", NULL), 1);

	/* Without a command there is none. */
	configure(NULL);
	victim = orchestrator_start(WAITS, 0);
	CHECK(kill(victim.pid, SIGKILL) == 0);
	orchestrator_ends(&victim, SIGKILL);
	CHECK_INT(lines("fired"), 1);
	CHECK_INT(lines("recovery-started"), 0);
	check_no_children();
}

static void takes_a_closed_socket_for_a_death(void)
{
	guests_start(guests, true);
	configure("exit 3");
	struct orchestrator lost = orchestrator_start(ARMS | STOPS_GUESTS | HANGS_UP, 60000);

	orchestrator_ends(&lost, SIGKILL);
	check_all_run();
	CHECK(strstr(read_back(record_fd), "reason=orchestrator-gone\n"));
	CHECK_INT(lines("orchestrator-killed"), 1);
	CHECK_INT(number("recovery-ended", "status"), 3);

	/* Not armed: nothing is stopped, and nobody needs to die. */
	configure("exit 3");
	lost = orchestrator_start(HANGS_UP, 0);
	for (int i = 0; i < 5000 && lines("quit") == 0; i++)
		sleep_ms(1);
	CHECK_INT(lines("quit"), 1);
	CHECK_INT(waitpid(lost.pid, NULL, WNOHANG), 0);
	CHECK(kill(lost.pid, SIGKILL) == 0);
	orchestrator_ends(&lost, SIGKILL);
	CHECK_INT(lines("fired") + lines("recovery-started"), 0);
	check_no_children();
}

static void does_not_wait_for_ever_for_the_recovery(void)
{
	configure("exec sleep 60");
	config.recovery_ns = 50 * MS;
	struct orchestrator victim = orchestrator_start(ARMS | ENDS, 60000);

	orchestrator_ends(&victim, 0);
	pid_t left = (pid_t)number("recovery-left", "pid");

	CHECK_INT(number("recovery-started", "pid"), left);
	CHECK_INT(getsid(left), left);
	CHECK_INT(sched_getscheduler(left), SCHED_OTHER);
	CHECK(kill(left, SIGTERM) == 0); /* not ignored */
	CHECK_INT(wait_for(left), SIGTERM);

	/* A command that cannot be started, in two ways. */
	configure("exit 0");
	char missing[] = "/nonexistent";

	arguments[0] = missing;
	victim = orchestrator_start(ENDS, 0);
	orchestrator_ends(&victim, 0);
	CHECK_INT(number("recovery-ended", "status"), 127);

	configure("exit 0");
	INJECT(_Fork, EAGAIN, 0);
	victim = orchestrator_start(ENDS | FAULTY_KEEPER, 0);
	inject__Fork.error = 0;
	orchestrator_ends(&victim, 0);
	CHECK_INT(number("recovery-ended", "status"), 126);

	/* One that cannot be watched. */
	configure("exit 0");
	INJECT_SYSCALL(SYS_pidfd_open, EMFILE, 0);
	victim = orchestrator_start(ENDS | FAULTY_KEEPER, 0);
	inject_syscall.error = 0;
	orchestrator_ends(&victim, 0);
	CHECK_INT(wait_for((pid_t)number("recovery-left", "pid")), 0);
	check_no_children();
}

/* ---- a keeper in trouble ---- */

static void tells_of_a_dead_keeper(void)
{
	configure("exit 0");
	int fds = count_fds();

	start();
	CHECK_INT(hu_keeper_arm(keeper.control_fd, in_ms(60000), WAIT_NS), 0);
	CHECK(kill(keeper.pid, SIGKILL) == 0);
	CHECK(readable(keeper.control_fd, 5000));
	CHECK_INT(hu_keeper_arm(keeper.control_fd, in_ms(60000), WAIT_NS), -EPIPE);
	CHECK_INT(hu_keeper_disarm(keeper.control_fd, WAIT_NS), -EPIPE);
	CHECK_INT(hu_keeper_stop(&keeper, WAIT_NS), -EPIPE);
	close(keeper.control_fd);
	close(keeper.pidfd);
	CHECK_INT(count_fds(), fds);
	check_no_children();
}

static void gives_up_on_a_silent_keeper(void)
{
	configure("exit 0");
	start();
	CHECK(kill(keeper.pid, SIGSTOP) == 0);
	CHECK_INT(hu_keeper_arm(keeper.control_fd, in_ms(60000), 20 * MS), -ETIMEDOUT);
	CHECK_INT(hu_keeper_disarm(keeper.control_fd, 20 * MS), -ETIMEDOUT);
	CHECK_INT(hu_keeper_stop(&keeper, 20 * MS), -ETIMEDOUT);
	CHECK(kill(keeper.pid, SIGCONT) == 0);
	/* It hears all of it now: armed, disarmed, disarmed, and the end. */
	CHECK(readable(keeper.pidfd, 5000));
	CHECK_INT(hu_keeper_stop(&keeper, WAIT_NS), -EPIPE);
	close(keeper.control_fd);
	close(keeper.pidfd);
	CHECK_INT(lines("armed"), 1);
	CHECK_INT(lines("disarmed"), 2);
	CHECK_INT(lines("quit"), 1);
	CHECK_INT(lines("fired"), 0);

	/* A socket that is full, and one that fails. */
	configure("exit 0");
	start();
	INJECT(send, EAGAIN, 0);
	CHECK_INT(hu_keeper_disarm(keeper.control_fd, WAIT_NS), -ETIMEDOUT);
	INJECT(send, ECONNRESET, 0);
	CHECK_INT(hu_keeper_disarm(keeper.control_fd, WAIT_NS), -EPIPE);
	INJECT(send, EINTR, 0);
	CHECK_INT(hu_keeper_disarm(keeper.control_fd, WAIT_NS), 0);
	INJECT(recv, ECONNRESET, 0);
	CHECK_INT(hu_keeper_disarm(keeper.control_fd, WAIT_NS), -EPIPE);
	INJECT(recv, EIO, 0);
	CHECK_INT(hu_keeper_disarm(keeper.control_fd, WAIT_NS), -EIO);
	INJECT(recv, EINTR, 0); /* and answers to questions given up are passed over */
	CHECK_INT(hu_keeper_disarm(keeper.control_fd, WAIT_NS), 0);
	INJECT(ppoll, EINTR, 0);
	CHECK_INT(hu_keeper_disarm(keeper.control_fd, WAIT_NS), 0);
	INJECT(ppoll, ENOMEM, 0);
	CHECK_INT(hu_keeper_disarm(keeper.control_fd, WAIT_NS), -ENOMEM);
	CHECK_INT(hu_keeper_disarm(keeper.control_fd, WAIT_NS), 0);
	stop();
	check_no_children();
}

static void starts_wholly_or_not_at_all(void)
{
	configure("exit 0");
	int fds = count_fds();

	memset(&keeper, 0, sizeof(keeper));

#define STARTS_WITH(error) CHECK_INT(hu_keeper_start(&config, WAIT_NS, &keeper), error)

	INJECT_SYSCALL(SYS_pidfd_open, EMFILE, 0);
	STARTS_WITH(-EMFILE);
	INJECT(socketpair, ENFILE, 0);
	STARTS_WITH(-ENFILE);
	for (int i = 0; i < 3; i++) {
		INJECT(calloc, ENOMEM, i);
		STARTS_WITH(-ENOMEM);
	}
	INJECT(_Fork, EAGAIN, 0);
	STARTS_WITH(-EAGAIN);
	INJECT_SYSCALL(SYS_pidfd_open, EMFILE, 1);
	STARTS_WITH(-EMFILE);
	/* In the child. */
	for (int i = 0; i < 2; i++) {
		INJECT(close_range, ENOSYS, i);
		STARTS_WITH(-ENOSYS);
	}
	inject_close_range.error = 0;
	INJECT(chdir, EACCES, 0);
	STARTS_WITH(-EACCES);
	inject_chdir.error = 0;
	inject_not_in = getpid();
	INJECT(send, EIO, 0); /* it is ready, but cannot say so */
	CHECK_INT(hu_keeper_start(&config, 50 * MS, &keeper), -ETIMEDOUT);
	inject_send.error = 0;
	inject_not_in = 0;
	/* In the parent. */
	INJECT(recv, EIO, 0);
	STARTS_WITH(-EIO);

	/* Locking takes too long. */
	const int32_t ram[] = { 0, 1, 2 };

	config.ram_fds = ram;
	config.ram_count = 3;
	fake_lock_hangs = true;
	CHECK_INT(hu_keeper_start(&config, 50 * MS, &keeper), -ETIMEDOUT);
	fake_lock_hangs = false;

	CHECK_INT(keeper.pid, 0);
	CHECK_INT(count_fds(), fds);
	CHECK_INT(waitpid(-1, NULL, WNOHANG | __WALL), -1);

	/* These do no harm. */
	fake_lock_error = -EAGAIN;
	start();
	CHECK_INT(keeper.lock_error, -EAGAIN);
	CHECK_INT(keeper.locked_bytes, 2 * 4096);
	stop();
	fake_lock_error = 0;
	INJECT(mmap, ENOMEM, 0);
	start();
	CHECK(keeper.anchor_pid <= 0);
	stop();
	INJECT(clone, EAGAIN, 0);
	start();
	CHECK(keeper.anchor_pid <= 0);
	stop();
	CHECK_INT(count_fds(), fds);
	check_no_children();
}

/* The disk is full: all of it works, only nobody can read of it. */
static void needs_no_record(void)
{
	guests_start(guests, true);
	configure("echo done");
	struct orchestrator victim;
	int full = open("/dev/full", O_WRONLY | O_CLOEXEC);

	CHECK(full >= 0);
	config.record_fd = full;
	victim = orchestrator_start(ARMS | STOPS_GUESTS, 60000);
	CHECK(kill(victim.pid, SIGKILL) == 0);
	orchestrator_ends(&victim, SIGKILL);
	close(full);
	check_all_run();
	CHECK(strcmp(read_back(log_fd), "done\n") == 0);
	check_no_children();
}

static void records_a_guest_that_cannot_be_let_run(void)
{
	guests_start(guests, true);
	configure("exit 0");
	config.settle_ns = 30 * MS;
	struct orchestrator victim = orchestrator_start(ARMS | STOPS_GUESTS, 60000);

	CHECK_INT(write_text(test_root, "cgroup.freeze", "1"), 0); /* held from above */
	CHECK(kill(victim.pid, SIGKILL) == 0);
	orchestrator_ends(&victim, SIGKILL);
	CHECK_INT(number("thawed", "error"), -ETIMEDOUT);
	CHECK_INT(number("thawed", NULL), 0);
	CHECK_INT(number("recovery-ended", "status"), 0);
	CHECK_INT(write_text(test_root, "cgroup.freeze", "0"), 0);
	check_all_run();
	check_no_children();
}

static void moves_out_of_the_way(void)
{
	char path[200];

	snprintf(path, sizeof(path), "%s/keeper", test_root);
	CHECK(mkdir(path, 0755) == 0);
	configure("exit 0");
	snprintf(path, sizeof(path), "%s/keeper/cgroup.procs", test_root);
	config.cgroup_procs_fd = open(path, O_WRONLY | O_CLOEXEC);
	CHECK(config.cgroup_procs_fd >= 0);
	start();
	read_proc(keeper.pid, "cgroup");
	CHECK(strstr(text, "/keeper\n"));
	stop();
	close(config.cgroup_procs_fd);
	snprintf(path, sizeof(path), "%s/keeper", test_root);
	CHECK(rmdir(path) == 0);
	check_no_children();
}

int main(void)
{
	if (!have_pidfd())
		return SKIP;
	/* Orphans of killed orchestrators come to us. */
	CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
	test_cleanup = everything_stop;
	lives_and_ends(false);
	fires_at_the_deadline_and_hands_over(false);
	outlives_the_orchestrator(false);
	recovers_from_a_death_before_arming();
	does_not_wait_for_ever_for_the_recovery();
	tells_of_a_dead_keeper();
	gives_up_on_a_silent_keeper();
	starts_wholly_or_not_at_all();
	if (!root_make())
		return SKIP;
	lives_and_ends(true);
	fires_at_the_deadline_and_hands_over(true);
	outlives_the_orchestrator(true);
	kills_who_does_not_answer();
	takes_a_closed_socket_for_a_death();
	needs_no_record();
	records_a_guest_that_cannot_be_let_run();
	moves_out_of_the_way();
	free(arguments[2]);
	CHECK(rmdir(test_root) == 0);
	test_root[0] = '\0';
	return 0;
}
