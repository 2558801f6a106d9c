// SPDX-License-Identifier: Apache-2.0
#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "fault.h"
#include "internal.h"

/*
 * The kernel puts off a second notification of the same cgroup file until 10 ms after the first
 * (CGROUP_FILE_NOTIFY_MIN_INTV in kernel/cgroup/cgroup.c): a thaw right after a freeze would be
 * seen late. So the files are also read at this interval.
 */
#define CGROUP_TICK_NS 1000000

/* Nothing tells a process that is not the parent that another one has stopped. */
#define THREADS_TICK_NS 100000

/*
 * Real-time priority for the calling thread, where allowed, while it makes its requests: else the
 * guests that it wakes take the CPU from it between the first and the last (8 guests on 2 CPUs, 2
 * of them busy: all running after 0.2 ms instead of 2 to 5). Not while it waits for them to stop:
 * they need the CPU for that.
 */
struct priority {
	int policy; /* to return to; -1: was not changed */
	struct sched_param param;
};

static struct priority priority_raise(void)
{
	struct priority before = { .policy = sched_getscheduler(0) };
	const struct sched_param lowest = { .sched_priority = 1 };

	if (before.policy != SCHED_OTHER || sched_getparam(0, &before.param) < 0 ||
	    sched_setscheduler(0, SCHED_FIFO, &lowest) < 0)
		before.policy = -1;
	return before;
}

static void priority_restore(const struct priority *before)
{
	if (before->policy >= 0)
		(void)sched_setscheduler(0, before->policy, &before->param);
}

static bool has_cgroup(const struct hu_guest *guest)
{
	return guest->freeze_fd >= 0;
}

static bool is_gone(int error)
{
	return error == -ENODEV || error == -ESRCH;
}

static int guest_ask(const struct hu_guest *guest, bool stop)
{
	if (!has_cgroup(guest)) {
		if (hu_pidfd_send_signal(guest->pidfd, stop ? SIGSTOP : SIGCONT) < 0)
			return -errno;
		return 0;
	}

	if (TEMP_FAILURE_RETRY(write(guest->freeze_fd, stop ? "1" : "0", 1)) < 0)
		return -errno; /* ENODEV where the cgroup was removed */
	return 0;
}

/* 1 where the cgroup's processes are frozen, 0 where not, -ESRCH where there are none. */
static int cgroup_frozen(int events_fd)
{
	char text[128];
	ssize_t length = TEMP_FAILURE_RETRY(pread(events_fd, text, sizeof(text) - 1, 0));

	if (length < 0)
		return -errno; /* ENODEV where the cgroup was removed */
	text[length] = '\0';

	/* An empty cgroup reports itself frozen (cgroup_do_freeze in kernel/cgroup/freezer.c). */
	if (strstr(text, "populated 0"))
		return -ESRCH;

	const char *frozen = strstr(text, "frozen ");

	if (!frozen) /* before Linux 5.2 */
		return -EOPNOTSUPP;
	return frozen[strlen("frozen ")] == '1';
}

/* The state letter of a thread, see proc(5); -ENOENT or -ESRCH where it has ended. */
static int thread_state(int tasks_fd, const char *tid)
{
	char path[32];
	char text[256];

	snprintf(path, sizeof(path), "%.20s/stat", tid);
	cleanup_close int fd = openat(tasks_fd, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;

	ssize_t length = TEMP_FAILURE_RETRY(read(fd, text, sizeof(text) - 1));

	if (length < 0)
		return -errno;
	text[length] = '\0';

	/* "1 (name) S ...": the name may hold anything, what follows it no parenthesis. */
	const char *name_end = strrchr(text, ')');

	if (!name_end || name_end[1] != ' ')
		return -EIO;
	return (unsigned char)name_end[2];
}

/* 1 where all threads are stopped (or none is, as asked for), 0 where not or not surely. */
static int threads_seen(const struct hu_guest *guest, bool stopped)
{
	char path[32];

	snprintf(path, sizeof(path), "/proc/%d/task", guest->pid);
	cleanup_close int tasks = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (tasks < 0)
		return errno == ENOENT ? -ESRCH : -errno;

	bool all = true;
	size_t alive = 0;

	for (;;) {
		/* Not opendir: it allocates, which the keeper must not. */
		_Alignas(struct dirent64) char entries[4096];
		ssize_t length = getdents64(tasks, entries, sizeof(entries));

		if (length < 0)
			return errno == ENOENT ? -ESRCH : -errno;
		if (length == 0)
			break;

		for (ssize_t at = 0; at < length;) {
			const struct dirent64 *entry = (const void *)(entries + at);

			at += entry->d_reclen;
			if (entry->d_name[0] == '.')
				continue;

			int state = thread_state(tasks, entry->d_name);

			if (state == -ENOENT || state == -ESRCH) {
				all = false; /* the list moved while it was read: look again */
				continue;
			}
			if (state < 0)
				return state;
			if (state == 'Z' || state == 'X')
				continue; /* never runs again */
			alive++;
			if ((state == 'T' || state == 't') != stopped)
				all = false;
		}
	}

	/* The number may have become another process's meanwhile; the pidfd cannot. */
	if (alive == 0 || (hu_pidfd_send_signal(guest->pidfd, 0) < 0 && errno == ESRCH))
		return -ESRCH;
	return all;
}

/* 1 where the guest is seen in that state, 0 where it is not yet. */
static int guest_seen(const struct hu_guest *guest, bool stopped)
{
	if (!has_cgroup(guest))
		return threads_seen(guest, stopped);

	int frozen = cgroup_frozen(guest->events_fd);

	if (frozen < 0)
		return frozen;
	return frozen == stopped;
}

void hu_guests_ask(const struct hu_guest *guests, size_t count, bool stop, struct hu_wait *waits)
{
	memset(waits, 0, count * sizeof(*waits));
	for (size_t i = 0; i < count; i++) {
		waits[i].stamp.requested_monotonic_ns = hu_monotonic_ns();
		int r = guest_ask(&guests[i], stop);

		waits[i].pending = r == 0;
		if (r == 0 || (!stop && is_gone(r)))
			continue;
		waits[i].error = r;
		if (stop)
			return;
	}
}

void hu_guests_settle(const struct hu_guest *guests, size_t count, bool stop,
		      int64_t deadline_monotonic_ns, struct hu_wait *waits, struct pollfd *polls)
{
	for (size_t i = 0; i < count; i++) {
		if (stop && waits[i].error < 0)
			return;
		/* A pidfd is readable when its process has ended, see pidfd_open(2). */
		bool cgroup = has_cgroup(&guests[i]);
		polls[i] = (struct pollfd){
			.fd = cgroup ? guests[i].events_fd : guests[i].pidfd,
			.events = cgroup ? POLLPRI : POLLIN,
		};
		if (!waits[i].pending)
			polls[i].fd = -1;
	}

	for (int ready = 0;;) {
		int64_t tick_ns = CGROUP_TICK_NS;
		bool pending = false;

		for (size_t i = 0; i < count; i++) {
			if (!waits[i].pending)
				continue;

			int seen = 0;

			if (ready == 0 || polls[i].revents)
				seen = guest_seen(&guests[i], stop);
			if (seen == 0) {
				pending = true;
				if (!has_cgroup(&guests[i]))
					tick_ns = THREADS_TICK_NS;
				continue;
			}
			waits[i].pending = false;
			polls[i].fd = -1; /* poll passes over it from now on */
			if (seen > 0) {
				waits[i].stamp.settled_monotonic_ns = hu_monotonic_ns();
			} else if (stop || !is_gone(seen)) {
				waits[i].error = seen;
				if (stop)
					return;
			}
		}
		if (!pending)
			return;

		int error = 0;
		int64_t left_ns = deadline_monotonic_ns - hu_monotonic_ns();

		if (left_ns <= 0) {
			error = -ETIMEDOUT;
		} else {
			struct timespec wait = hu_timespec(left_ns < tick_ns ? left_ns : tick_ns);

			/* It must sleep: a waiter that spins takes a CPU from those that stop. */
			ready = ppoll(polls, count, &wait, NULL);
			if (ready < 0 && errno != EINTR)
				error = -errno;
			if (ready < 0)
				ready = 0; /* revents are not set: look at all */
		}
		if (error < 0) {
			for (size_t i = 0; i < count; i++)
				if (waits[i].pending)
					waits[i].error = error;
			return;
		}
	}
}

int hu_guests_freeze(const struct hu_guest *guests, size_t count, int64_t deadline_monotonic_ns,
		     struct hu_stamp *ret_stamps, size_t *ret_failed)
{
	if (count == 0)
		return 0;

	cleanup_free struct hu_wait *waits = calloc(count, sizeof(*waits));
	cleanup_free struct pollfd *polls = calloc(count, sizeof(*polls));
	int error = 0;
	size_t failed = count;

	if (!waits || !polls)
		error = -ENOMEM;
	else if (hu_monotonic_ns() >= deadline_monotonic_ns)
		error = -ETIMEDOUT;

	if (error == 0) {
		struct priority before = priority_raise();

		hu_guests_ask(guests, count, true, waits);
		priority_restore(&before);
		if (waits[0].error == 0)
			waits[0].error = hu_fault("core.freeze");
		hu_guests_settle(guests, count, true, deadline_monotonic_ns, waits, polls);
		for (failed = 0; failed < count && waits[failed].error == 0; failed++)
			;
		if (failed < count) {
			error = waits[failed].error;
			hu_guests_ask(guests, count, false, waits);
		}
	}

	if (error < 0) {
		if (ret_failed)
			*ret_failed = failed;
		return error;
	}
	for (size_t i = 0; i < count; i++)
		ret_stamps[i] = waits[i].stamp;
	return 0;
}

int hu_guests_thaw(const struct hu_guest *guests, size_t count, int64_t deadline_monotonic_ns,
		   struct hu_stamp *ret_stamps)
{
	if (count == 0)
		return 0;

	cleanup_free struct hu_wait *waits = calloc(count, sizeof(*waits));
	cleanup_free struct pollfd *polls = calloc(count, sizeof(*polls));
	int error = 0;

	if (!waits || !polls) {
		/* They must run all the same; only nobody looks whether they do. */
		for (size_t i = 0; i < count; i++) {
			struct hu_wait wait;

			hu_guests_ask(&guests[i], 1, false, &wait);
			ret_stamps[i] = wait.stamp;
		}
		return -ENOMEM;
	}

	struct priority before = priority_raise();

	hu_guests_ask(guests, count, false, waits);
	hu_guests_settle(guests, count, false, deadline_monotonic_ns, waits, polls);
	priority_restore(&before);
	if (waits[0].error == 0)
		waits[0].error = hu_fault("core.thaw");
	for (size_t i = 0; i < count; i++) {
		ret_stamps[i] = waits[i].stamp;
		if (error == 0)
			error = waits[i].error;
	}
	return error;
}

int hu_guest_frozen(const struct hu_guest *guest)
{
	return guest_seen(guest, true);
}
