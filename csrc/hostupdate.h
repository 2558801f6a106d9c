/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hostupdate's C core: what must be quick, must be exact, or must not run Python.
 *
 * Every function returns 0 or a count on success and -errno on failure. On failure its ret_
 * arguments are untouched and what the call itself had changed is undone, unless its comment says
 * otherwise. Every descriptor made is O_CLOEXEC. Interrupted system calls are retried. Times are
 * int64_t nanoseconds and carry the name of their clock. Nothing here logs, exits or keeps state
 * between calls.
 */
#ifndef HOSTUPDATE_H
#define HOSTUPDATE_H

#include <stddef.h>
#include <stdint.h>

/* ---- freezer: stop and start all guests of a host ---- */

/* One guest: its cgroup's open files, or, where the host has no cgroup v2, its process. */
struct hu_guest {
	int32_t freeze_fd; /* cgroup.freeze, O_RDWR; -1: use pidfd */
	int32_t events_fd; /* cgroup.events, O_RDONLY; -1: use pidfd */
	int32_t pidfd; /* the guest's QEMU; -1 where the cgroup's files are given */
	int32_t pid; /* its pid, to read its threads' state; only used with pidfd */
};

struct hu_stamp {
	int64_t requested_monotonic_ns; /* just before the kernel was asked */
	int64_t settled_monotonic_ns; /* the guest was seen stopped (or running) at this time */
};

/*
 * Stops every guest or none. All requests are made first, then all are waited for.
 * ret_failed, where not NULL, tells on failure which guest was the culprit; count: none of them.
 * -ETIMEDOUT: one was not stopped by the deadline; -ENODEV: its cgroup is gone; -ESRCH: its
 * processes are gone; -ENOMEM, or a deadline that has passed: nobody was asked. After any other
 * failure every guest has been told to run. A guest that was stopped before counts as stopped.
 */
int hu_guests_freeze(const struct hu_guest *guests, size_t count, int64_t deadline_monotonic_ns,
		     struct hu_stamp *ret_stamps, size_t *ret_failed);

/*
 * Lets every guest run. There is no undo and no early end: all are asked whatever happens to one,
 * and the first error is returned. ret_stamps is filled on failure too: settled is 0 for a guest
 * that was not seen running by the deadline. A guest that is gone needs no thaw: its settled is 0
 * and it is no error.
 */
int hu_guests_thaw(const struct hu_guest *guests, size_t count, int64_t deadline_monotonic_ns,
		   struct hu_stamp *ret_stamps);

/* 1 where the guest is stopped, 0 where it may run; -ENODEV, -ESRCH where it is gone. */
int hu_guest_frozen(const struct hu_guest *guest);

/* ---- keeper: the dead-man process ---- */

struct hu_keeper_config {
	const struct hu_guest *guests;
	size_t guest_count;
	const int32_t *ram_fds; /* shared guest RAM whose pages the keeper locks */
	size_t ram_count;
	int64_t grace_ns; /* how long a live orchestrator may take to answer a firing */
	int64_t settle_ns; /* how long to wait for guests to be seen running */
	int64_t recovery_ns; /* how long to wait for the recovery command; it is not killed */
	int32_t record_fd; /* append-only file for the keeper's record */
	int32_t cgroup_procs_fd; /* cgroup.procs to move itself to; -1: stay */
	int32_t recovery_log_fd; /* stdout and stderr of the recovery command */
	char *const *recovery_argv; /* absolute program first, NULL last; or NULL: no recovery */
	char *const *recovery_envp;
};

struct hu_keeper {
	int32_t pid;
	int32_t pidfd;
	int32_t control_fd; /* SOCK_SEQPACKET; readable when the keeper has fired or died */
	uint64_t locked_bytes; /* guest RAM locked in memory, all mappings */
	int32_t lock_error; /* 0, or the -errno of the first range that could not be locked */
	int32_t anchor_pid; /* process that makes a death quick; 0 or less: none */
	void *anchor_stack;
};

/*
 * Forks the keeper, not armed. It returns when the keeper has locked what it can and is ready, or
 * -ETIMEDOUT after timeout_ns (the keeper is killed and reaped then). The keeper keeps config's
 * descriptors; the caller may close its own, and closes those in ret_keeper.
 *
 * Its record is lines of text, times CLOCK_MONOTONIC in ns, one write each:
 *   ready NS pid=N locked_bytes=N lock_error=N
 *   armed NS deadline=NS
 *   disarmed NS
 *   fired NS reason=deadline|orchestrator-gone
 *   thawed NS guest=INDEX requested=NS error=N	(NS 0: not seen running, or gone)
 *   orchestrator-killed NS error=N
 *   recovery-started NS pid=N
 *   recovery-ended NS status=N		(exit status; minus the signal; 126: not started)
 *   recovery-left NS pid=N		(still running when recovery_ns was over)
 *   quit NS
 * While armed it writes none, so that a file system that hangs cannot hold up a firing.
 */
int hu_keeper_start(const struct hu_keeper_config *config, int64_t timeout_ns,
		    struct hu_keeper *ret_keeper);

/*
 * Arms: from now on the keeper lets all guests run when the deadline passes or the orchestrator
 * dies (or closes control_fd). Returns when the keeper has confirmed; on any failure pause nothing.
 * -EPIPE: the keeper is gone; -ETIMEDOUT: it did not answer, and disarms when it does; -EALREADY:
 * it is armed, as it was, or has fired.
 */
int hu_keeper_arm(int32_t control_fd, int64_t deadline_monotonic_ns, int64_t timeout_ns);

/*
 * Disarms. 0: it never fired; 1: it has fired, and the caller's answer is taken as "I recover".
 * -EPIPE: the keeper is gone; -ETIMEDOUT: it did not answer, and may be armed still.
 */
int hu_keeper_disarm(int32_t control_fd, int64_t timeout_ns);

/*
 * Ends the keeper and reaps it. -EBUSY: it is armed, or has fired and had no answer; it goes on.
 * -EPIPE: it was dead before, and is reaped; -ETIMEDOUT: it did not end in time.
 */
int hu_keeper_stop(const struct hu_keeper *keeper, int64_t timeout_ns);

/* 1 where the places of fault.h are compiled in. */
#ifdef HU_FAULTS
#define HU_FAULT_POINTS 1
#else
#define HU_FAULT_POINTS 0
#endif

/* ---- ram: where a guest's memory is ---- */

enum hu_ram_backing {
	HU_RAM_ANONYMOUS, /* private or shared memory without a name */
	HU_RAM_MEMFD,
	HU_RAM_SHMEM, /* a file on tmpfs */
	HU_RAM_HUGETLB,
	HU_RAM_FILE, /* a file on any other file system */
};

#define HU_RAM_PATH_SIZE 256

struct hu_ram_mapping {
	uint64_t start; /* address in the guest's QEMU */
	uint64_t length_bytes;
	uint64_t offset_bytes; /* in the backing file */
	uint64_t inode;
	uint64_t resident_bytes; /* mapped and in RAM, seen from QEMU's page tables */
	uint64_t swapped_bytes;
	uint64_t locked_bytes;
	int32_t backing; /* enum hu_ram_backing */
	int32_t shared; /* bool */
	char path[HU_RAM_PATH_SIZE]; /* as the kernel prints it, cut to size; "" where no file */
};

/*
 * The RAM blocks of a QEMU process: RAM, ROM and video memory. QEMU marks each with MADV_DONTFORK,
 * which the kernel shows as "dc" in the VmFlags of smaps; nothing else in a QEMU has it but device
 * memory, which is left out (ram.c says where in QEMU). Returns how many there are. A block may be
 * split in rows. On failure the content of ret_mappings is undefined. -E2BIG: capacity is too
 * small; -ESRCH: the process is gone, be it in the middle; -EACCES: it, or the files that it has
 * mapped, are not ours to look at (CAP_SYS_PTRACE; CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN for
 * files); -EAGAIN: it changed its mappings meanwhile; -EBADMSG: smaps cannot be understood. The
 * kernel walks the page tables for this: 13 ms for a GiB mapped, so not for the blackout.
 */
int hu_ram_mappings(int32_t pid, struct hu_ram_mapping *ret_mappings, size_t capacity);

/*
 * Opens the file behind a shared mapping, read-only, by /proc/PID/map_files. Returns the fd.
 * -EINVAL: the mapping is private, what the guest wrote is not in a file; -ENOENT: the process has
 * no such mapping with a file (any more); -ESRCH and -EACCES as above.
 */
int hu_ram_open(int32_t pid, const struct hu_ram_mapping *mapping);

struct hu_ram_lock {
	void *base;
	uint64_t length_bytes;
	uint64_t locked_bytes;
};

/*
 * Maps the file and locks its data pages in memory; holes stay holes. The mapping is not passed on
 * to children. hu_ram_unlock takes it back. Pages of hugetlbfs are never swapped: there is nothing
 * to do, base is NULL and no byte is counted, and so it is for an empty file. Data added later is
 * not locked. Without CAP_IPC_LOCK the whole length counts against RLIMIT_MEMLOCK (-ENOMEM,
 * -EPERM). No memory is allocated: the child of a multi-threaded process may call it.
 */
int hu_ram_lock(int32_t fd, struct hu_ram_lock *ret_lock);
int hu_ram_unlock(const struct hu_ram_lock *lock);

struct hu_ram_digest {
	uint64_t low;
	uint64_t high;
	uint64_t pages; /* that went in: read, and not zero */
};

/*
 * Digest of guest RAM, of 4 KiB pages, at memory speed. It depends on each page's content and its
 * place in the range, not on the order of reading; holes and zero pages do not count. Not
 * cryptographic: it proves that nothing changed by accident (digest.c says how well). sample_pages
 * 0 reads all, else that many pages spread evenly over the range, the same ones in each call; those
 * that are holes cost next to nothing. Equal content has an equal digest whatever way it is read.
 * It is a stable function of the content on machines of one byte order. -EINVAL: the range does
 * not begin at a page.
 */
int hu_ram_digest_file(int32_t fd, uint64_t offset_bytes, uint64_t length_bytes,
		       uint64_t sample_pages, struct hu_ram_digest *ret_digest);

/*
 * The same of one mapping as the process sees it: its own pages are read from the process, the rest
 * from the file behind it. Untouched memory stays untouched; what was swapped out comes back.
 * -ESRCH, -EACCES, -ENOENT as for hu_ram_open; -EFAULT: not all of it is mapped (any more), or the
 * memory is defective; -EOPNOTSUPP: private memory on a machine whose pages are not of 4 KiB.
 */
int hu_ram_digest_process(int32_t pid, const struct hu_ram_mapping *mapping, uint64_t sample_pages,
			  struct hu_ram_digest *ret_digest);

/* ---- address space ---- */

/*
 * Keeps the address space of a process until the returned descriptor is closed, also by this
 * process's end. One that dies meanwhile is gone at once: its memory is unmapped by a thread of this
 * process after the close, which does not wait for it (60 ms for a GiB mapped in pages of 4 KiB).
 * Until then its mappings keep what they map in use: those of a vCPU keep KVM's modules loaded.
 * -ESRCH: there is no such process, or it has begun to die; -EACCES: it is not ours to look at;
 * -EPERM, -ENOSYS: no userfaultfd for us (CAP_SYS_PTRACE) or in this kernel; -ETIMEDOUT.
 */
int hu_address_space_hold(int32_t pid, int64_t timeout_ns);

/* ---- clock ---- */

struct hu_clock_reading {
	int64_t reference_ns; /* midpoint of the two readings of the reference clock */
	int64_t reading_ns; /* the other clock, read between them */
	int64_t uncertainty_ns; /* half the distance of the two */
};

/* The tightest of `tries` bracketed readings of one clock against another (CLOCK_* numbers). */
int hu_clock_bracket(int32_t reference_clock, int32_t clock, uint32_t tries,
		     struct hu_clock_reading *ret_reading);

/* 1 where something keeps the host's real time right (NTP, PTP), by the kernel's account; else 0. */
int hu_clock_synchronised(void);

#endif
