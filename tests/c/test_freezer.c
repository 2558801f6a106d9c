// SPDX-License-Identifier: Apache-2.0
/* WRAP: write pread ppoll syscall calloc open openat read getdents64 */
#include "test.h"

WRAPPER(ssize_t, -1, write, (int fd, const void *data, size_t size), (fd, data, size))
WRAPPER(int, -1, ppoll,
	(struct pollfd * fds, nfds_t count, const struct timespec *wait, const sigset_t *mask),
	(fds, count, wait, mask))
WRAPPER(void *, NULL, calloc, (size_t count, size_t size), (count, size))
WRAPPER(int, -1, open, (const char *path, int flags, mode_t mode), (path, flags, mode))
WRAPPER(int, -1, openat, (int at, const char *path, int flags, mode_t mode),
	(at, path, flags, mode))
WRAPPER(ssize_t, -1, getdents64, (int fd, void *data, size_t size), (fd, data, size))
WRAP_SYSCALL

/* What a file says instead of what the kernel says. */
static const char *fake_events;
static const char *fake_stat;

ssize_t __real_pread(int fd, void *data, size_t size, off_t offset);
ssize_t __wrap_pread(int fd, void *data, size_t size, off_t offset);
static struct injection inject_pread;

ssize_t __wrap_pread(int fd, void *data, size_t size, off_t offset)
{
	if (injected(&inject_pread))
		return -1;
	if (!fake_events)
		return __real_pread(fd, data, size, offset);
	memcpy(data, fake_events, strlen(fake_events));
	return (ssize_t)strlen(fake_events);
}

ssize_t __real_read(int fd, void *data, size_t size);
ssize_t __wrap_read(int fd, void *data, size_t size);
static struct injection inject_read;

ssize_t __wrap_read(int fd, void *data, size_t size)
{
	if (injected(&inject_read))
		return -1;
	if (!fake_stat)
		return __real_read(fd, data, size);
	memcpy(data, fake_stat, strlen(fake_stat));
	return (ssize_t)strlen(fake_stat);
}

static struct hu_guest guests[GUESTS];
static struct hu_stamp stamps[GUESTS];
static size_t failed;

static int freeze(int64_t deadline_ns)
{
	memset(stamps, 0, sizeof(stamps));
	failed = 99;
	return hu_guests_freeze(guests, GUESTS, deadline_ns, stamps, &failed);
}

static int thaw(int64_t deadline_ns)
{
	memset(stamps, 0xff, sizeof(stamps));
	return hu_guests_thaw(guests, GUESTS, deadline_ns, stamps);
}

static void check_all_run(void)
{
	for (int i = 0; i < GUESTS; i++) {
		CHECK_INT(hu_guest_frozen(&guests[i]), 0);
		CHECK(guest_runs(&test_guests[i]));
	}
}

/* A freeze failed so, with nothing in ret_stamps, and all run. */
static void check_failed(int r, int error, size_t culprit)
{
	CHECK_INT(r, error);
	CHECK_INT(failed, culprit);
	for (int i = 0; i < GUESTS; i++)
		CHECK_INT(stamps[i].requested_monotonic_ns, 0);
}

/* ---- both ways ---- */

static void stops_and_starts_all(bool cgroups)
{
	guests_start(guests, cgroups);
	int fds = count_fds();

	for (int round = 0; round < 3; round++) {
		int64_t before_ns = hu_monotonic_ns();

		CHECK_INT(freeze(in_ms(5000)), 0);
		int64_t after_ns = hu_monotonic_ns();

		CHECK_INT(failed, 99);
		for (int i = 0; i < GUESTS; i++) {
			CHECK(before_ns <= stamps[i].requested_monotonic_ns);
			CHECK(stamps[i].requested_monotonic_ns < stamps[i].settled_monotonic_ns);
			CHECK(stamps[i].settled_monotonic_ns <= after_ns);
			CHECK_INT(hu_guest_frozen(&guests[i]), 1);
			CHECK(guest_still(&test_guests[i]));
		}
		/* Stopped ones count as stopped. */
		CHECK_INT(freeze(in_ms(5000)), 0);

		CHECK_INT(thaw(in_ms(5000)), 0);
		for (int i = 0; i < GUESTS; i++)
			CHECK(stamps[i].requested_monotonic_ns < stamps[i].settled_monotonic_ns);
		check_all_run();
	}
	CHECK_INT(thaw(in_ms(5000)), 0);

	CHECK_INT(hu_guests_freeze(NULL, 0, 0, NULL, NULL), 0);
	CHECK_INT(hu_guests_thaw(NULL, 0, 0, NULL), 0);
	CHECK_INT(count_fds(), fds);
	guests_stop();
}

static void stops_nobody_after_the_deadline(bool cgroups)
{
	guests_start(guests, cgroups);
	check_failed(freeze(hu_monotonic_ns() - 1), -ETIMEDOUT, GUESTS);
	check_all_run();

	INJECT(calloc, ENOMEM, 0);
	check_failed(freeze(in_ms(5000)), -ENOMEM, GUESTS);
	INJECT(calloc, ENOMEM, 1);
	check_failed(freeze(in_ms(5000)), -ENOMEM, GUESTS);
	check_all_run();

	/* Thawing cannot be refused, even without memory. */
	CHECK_INT(freeze(in_ms(5000)), 0);
	INJECT(calloc, ENOMEM, 0);
	CHECK_INT(thaw(in_ms(5000)), -ENOMEM);
	CHECK(stamps[1].requested_monotonic_ns > 0);
	CHECK_INT(stamps[1].settled_monotonic_ns, 0);
	check_all_run();
	guests_stop();
}

static void needs_no_interruption(bool cgroups)
{
	guests_start(guests, cgroups);
	INJECT(ppoll, EINTR, 0);
	INJECT(write, EINTR, 1);
	INJECT(pread, EINTR, 1);
	INJECT(read, EINTR, 1);
	CHECK_INT(freeze(in_ms(5000)), 0);
	INJECT(write, EINTR, 1);
	INJECT(pread, EINTR, 1);
	CHECK_INT(thaw(in_ms(5000)), 0);
	check_all_run();
	inject_ppoll.error = inject_read.error = inject_write.error = inject_pread.error = 0;
	guests_stop();
}

/* ---- cgroups ---- */

static void runs_all_after_any_error(void)
{
	guests_start(guests, true);
	for (int i = 0; i < GUESTS; i++) {
		INJECT(write, EIO, i);
		check_failed(freeze(in_ms(5000)), -EIO, (size_t)i);
		check_all_run();
		INJECT(pread, EIO, i);
		check_failed(freeze(in_ms(5000)), -EIO, (size_t)i);
		check_all_run();
	}

	INJECT(ppoll, ENOMEM, 0);
	fake_events = "populated 1\nfrozen 0\n";
	check_failed(freeze(in_ms(5000)), -ENOMEM, 0);
	check_failed(freeze(in_ms(30)), -ETIMEDOUT, 0);
	fake_events = "populated 1\n"; /* as before Linux 5.2 */
	check_failed(freeze(in_ms(5000)), -EOPNOTSUPP, 0);
	fake_events = NULL;
	check_all_run();

	/* ret_failed may be absent. */
	INJECT(write, EIO, 1);
	CHECK_INT(hu_guests_freeze(guests, GUESTS, in_ms(5000), stamps, NULL), -EIO);
	check_all_run();
	guests_stop();
}

static void thaws_the_others_whatever_happens_to_one(void)
{
	guests_start(guests, true);
	CHECK_INT(freeze(in_ms(5000)), 0);
	INJECT(write, EIO, 1);
	CHECK_INT(thaw(in_ms(5000)), -EIO);
	CHECK(stamps[0].settled_monotonic_ns > 0 && stamps[2].settled_monotonic_ns > 0);
	CHECK_INT(stamps[1].settled_monotonic_ns, 0);
	CHECK_INT(hu_guest_frozen(&guests[1]), 1);
	CHECK(guest_runs(&test_guests[0]) && guest_runs(&test_guests[2]));
	INJECT(pread, EIO, 1);
	CHECK_INT(thaw(in_ms(5000)), -EIO);
	check_all_run();

	fake_events = "populated 1\nfrozen 1\n";
	CHECK_INT(thaw(in_ms(20)), -ETIMEDOUT);
	CHECK_INT(stamps[0].settled_monotonic_ns, 0);
	fake_events = NULL;
	guests_stop();
}

static void knows_a_guest_that_is_gone(void)
{
	guests_start(guests, true);

	/* Its processes: the cgroup is empty. Such a one reports itself frozen. */
	guest_kill(&test_guests[1]);
	check_failed(freeze(in_ms(5000)), -ESRCH, 1);
	CHECK_INT(hu_guest_frozen(&guests[1]), -ESRCH);
	CHECK(guest_runs(&test_guests[0]) && guest_runs(&test_guests[2]));
	CHECK_INT(thaw(in_ms(5000)), 0);
	CHECK_INT(stamps[1].settled_monotonic_ns, 0);

	/* Its cgroup: the files are dead. */
	CHECK(rmdir(test_guests[1].path) == 0);
	check_failed(freeze(in_ms(5000)), -ENODEV, 1);
	CHECK_INT(hu_guest_frozen(&guests[1]), -ENODEV);
	CHECK(guest_runs(&test_guests[0]) && guest_runs(&test_guests[2]));
	CHECK_INT(thaw(in_ms(5000)), 0);
	CHECK_INT(stamps[1].settled_monotonic_ns, 0);
	guests_stop();

	/* It dies while it is frozen. */
	guests_start(guests, true);
	CHECK_INT(freeze(in_ms(5000)), 0);
	guest_kill(&test_guests[2]);
	CHECK_INT(thaw(in_ms(5000)), 0);
	CHECK_INT(stamps[2].settled_monotonic_ns, 0);
	CHECK(stamps[0].settled_monotonic_ns > 0);
	guests_stop();
}

/* As libvirt does it: the guest's threads are in cgroups below its scope. */
static void stops_what_is_below(void)
{
	char child[800];

	guests_start(guests, true);
	for (int i = 0; i < GUESTS; i++) {
		snprintf(child, sizeof(child), "%s/emulator", test_guests[i].path);
		CHECK(mkdir(child, 0755) == 0);
		CHECK_INT(move_to(child, test_guests[i].pid), 0);
	}
	CHECK_INT(freeze(in_ms(5000)), 0);
	for (int i = 0; i < GUESTS; i++)
		CHECK(guest_still(&test_guests[i]));
	CHECK_INT(thaw(in_ms(5000)), 0);
	check_all_run();
	for (int i = 0; i < GUESTS; i++) {
		CHECK_INT(move_to(test_guests[i].path, test_guests[i].pid), 0);
		snprintf(child, sizeof(child), "%s/emulator", test_guests[i].path);
		CHECK(rmdir(child) == 0);
	}
	guests_stop();
}

static void tells_of_a_guest_held_by_another(void)
{
	guests_start(guests, true);
	CHECK_INT(freeze(in_ms(5000)), 0);
	CHECK_INT(write_text(test_root, "cgroup.freeze", "1"), 0);
	CHECK_INT(thaw(in_ms(30)), -ETIMEDOUT);
	for (int i = 0; i < GUESTS; i++)
		CHECK_INT(stamps[i].settled_monotonic_ns, 0);
	CHECK_INT(write_text(test_root, "cgroup.freeze", "0"), 0);
	CHECK_INT(thaw(in_ms(5000)), 0);
	check_all_run();
	guests_stop();
}

/* The kernel delays notifications that follow each other within 10 ms. */
static void does_not_wait_for_late_notifications(void)
{
	int64_t worst_ns = 0;

	guests_start(guests, true);
	for (int i = 0; i < 30; i++) {
		int64_t begin_ns = hu_monotonic_ns();

		CHECK_INT(freeze(in_ms(5000)), 0);
		CHECK_INT(thaw(in_ms(5000)), 0);
		int64_t took_ns = hu_monotonic_ns() - begin_ns;

		worst_ns += took_ns;
	}
	CHECK(worst_ns / 30 < 8 * MS);
	guests_stop();
}

/* ---- processes, where there is no cgroup v2 ---- */

static void process_errors_run_all(void)
{
	guests_start(guests, false);
	int fds = count_fds();

	for (int i = 0; i < GUESTS; i++) {
		INJECT_SYSCALL(SYS_pidfd_send_signal, EPERM, i);
		check_failed(freeze(in_ms(5000)), -EPERM, (size_t)i);
	}
	INJECT(open, EMFILE, 1);
	check_failed(freeze(in_ms(5000)), -EMFILE, 1);
	INJECT(openat, EMFILE, 0);
	check_failed(freeze(in_ms(5000)), -EMFILE, 0);
	INJECT(getdents64, EIO, 0);
	check_failed(freeze(in_ms(5000)), -EIO, 0);
	INJECT(getdents64, ENOENT, 0);
	check_failed(freeze(in_ms(5000)), -ESRCH, 0);
	INJECT(read, EIO, 0);
	check_failed(freeze(in_ms(5000)), -EIO, 0);
	fake_stat = "1 (no end";
	check_failed(freeze(in_ms(5000)), -EIO, 0);
	fake_stat = "1 (runs) R 1";
	check_failed(freeze(in_ms(30)), -ETIMEDOUT, 0);
	fake_stat = NULL;
	/* A thread that ends while they are counted: counted again. */
	INJECT(openat, ENOENT, 1);
	CHECK_INT(freeze(in_ms(5000)), 0);
	INJECT(read, ESRCH, 1);
	CHECK_INT(thaw(in_ms(5000)), 0);
	check_all_run();
	CHECK_INT(count_fds(), fds);
	guests_stop();
}

static void process_gone(void)
{
	guests_start(guests, false);
	CHECK(kill(test_guests[1].pid, SIGKILL) == 0);
	siginfo_t info;

	CHECK(waitid(P_PID, (id_t)test_guests[1].pid, &info, WEXITED | WNOWAIT) == 0);
	check_failed(freeze(in_ms(5000)), -ESRCH, 1); /* a zombie */
	CHECK_INT(hu_guest_frozen(&guests[1]), -ESRCH);
	CHECK_INT(thaw(in_ms(5000)), 0);
	guest_kill(&test_guests[1]);
	check_failed(freeze(in_ms(5000)), -ESRCH, 1);
	CHECK_INT(thaw(in_ms(5000)), 0);
	CHECK_INT(stamps[1].settled_monotonic_ns, 0);
	CHECK(stamps[2].settled_monotonic_ns > 0);

	/* Its number belongs to another process now: the pidfd knows better. */
	guests[1].pid = getpid();
	CHECK_INT(hu_guest_frozen(&guests[1]), -ESRCH);
	guests_stop();
}

static void mixes_both_ways(void)
{
	guests_start(guests, true);
	guest_stop(&test_guests[1]);
	guest_start(&test_guests[1], -1);
	guests[1] = test_guests[1].core;
	CHECK_INT(freeze(in_ms(5000)), 0);
	for (int i = 0; i < GUESTS; i++)
		CHECK(guest_still(&test_guests[i]));
	CHECK_INT(thaw(in_ms(5000)), 0);
	check_all_run();
	guests_stop();
}

static void leaves_the_priority_alone(void)
{
	guests_start(guests, false);
	CHECK_INT(freeze(in_ms(5000)), 0);
	CHECK_INT(sched_getscheduler(0), SCHED_OTHER);
	CHECK_INT(thaw(in_ms(5000)), 0);
	CHECK_INT(sched_getscheduler(0), SCHED_OTHER);
	guests_stop();
}

int main(void)
{
	int fds = count_fds();

	test_cleanup = everything_stop;
	bool processes = have_pidfd();

	if (processes) {
		stops_and_starts_all(false);
		stops_nobody_after_the_deadline(false);
		needs_no_interruption(false);
		process_errors_run_all();
		process_gone();
		leaves_the_priority_alone();
		CHECK_INT(count_fds(), fds);
	}
	if (!root_make())
		return SKIP;
	stops_and_starts_all(true);
	stops_nobody_after_the_deadline(true);
	needs_no_interruption(true);
	runs_all_after_any_error();
	thaws_the_others_whatever_happens_to_one();
	knows_a_guest_that_is_gone();
	stops_what_is_below();
	tells_of_a_guest_held_by_another();
	does_not_wait_for_late_notifications();
	if (processes)
		mixes_both_ways();
	CHECK_INT(count_fds(), fds);
	CHECK(rmdir(test_root) == 0);
	test_root[0] = '\0';
	return 0;
}
