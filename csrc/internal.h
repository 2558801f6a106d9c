/* SPDX-License-Identifier: Apache-2.0 */
/* What the C core's files share among themselves. Nothing here is for Python. */
#ifndef HOSTUPDATE_INTERNAL_H
#define HOSTUPDATE_INTERNAL_H

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "hostupdate.h"

#define NS_PER_SECOND 1000000000LL

static inline void hu_cleanup_close(int *fd)
{
	if (*fd >= 0)
		close(*fd);
}

static inline void hu_cleanup_free(void *pointer)
{
	free(*(void **)pointer);
}

#define cleanup_close __attribute__((cleanup(hu_cleanup_close)))
#define cleanup_free __attribute__((cleanup(hu_cleanup_free)))

static inline int64_t hu_monotonic_ns(void)
{
	struct timespec now;

	/* Cannot fail: the clock exists and the pointer is good, see clock_gettime(2). */
	(void)clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * NS_PER_SECOND + now.tv_nsec;
}

/* A relative time for ppoll, none below zero. */
static inline struct timespec hu_timespec(int64_t ns)
{
	if (ns < 0)
		ns = 0;
	return (struct timespec){ .tv_sec = ns / NS_PER_SECOND, .tv_nsec = ns % NS_PER_SECOND };
}

/* The end of a time-out that starts now; far ones do not wrap. */
static inline int64_t hu_deadline_ns(int64_t timeout_ns)
{
	int64_t deadline;

	if (__builtin_add_overflow(hu_monotonic_ns(), timeout_ns, &deadline))
		return INT64_MAX;
	return deadline;
}

/* glibc has wrappers for these since 2.36 only. */
static inline int hu_pidfd_open(pid_t pid)
{
	return (int)syscall(SYS_pidfd_open, pid, 0); /* the kernel sets O_CLOEXEC */
}

static inline int hu_pidfd_send_signal(int pidfd, int sig)
{
	return (int)syscall(SYS_pidfd_send_signal, pidfd, sig, NULL, 0);
}

/*
 * The two halves of a freeze or thaw, for the keeper: no memory is allocated, so they are safe in
 * the child of a multi-threaded process. polls and waits have room for count.
 */
struct hu_wait {
	struct hu_stamp stamp;
	int32_t error;
	bool pending; /* asked and not yet seen in the wanted state */
};

/* Asks all guests to stop or run. The first error ends a stop; a run goes on to the last guest. */
void hu_guests_ask(const struct hu_guest *guests, size_t count, bool stop, struct hu_wait *waits);

/* Waits for those pending. Ends at the deadline or, for a stop, at the first error. */
void hu_guests_settle(const struct hu_guest *guests, size_t count, bool stop,
		      int64_t deadline_monotonic_ns, struct hu_wait *waits, struct pollfd *polls);

#endif
