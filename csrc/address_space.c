// SPDX-License-Identifier: Apache-2.0
/*
 * Keeps a process's address space when the process is gone.
 *
 * A read of /proc/PID/pagemap takes a reference to the address space (mm_users) and drops it after
 * it has copied out what it found (fs/proc/task_mmu.c: pagemap_read). A thread reads to a page that
 * userfaultfd hands to nobody, and so stands in the middle of that for as long as the descriptor is
 * open. Who drops the last reference unmaps everything: that thread then, not the process's last.
 * A kernel that does it in another way makes the process's death as slow as it was, no worse.
 */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "ram.h"

#define ENTRY_SIZE 8 /* of a page, in pagemap */

struct reader {
	int pagemap_fd;
	void *page;
	size_t page_size;
};

static void reader_free(struct reader *reader)
{
	(void)munmap(reader->page, reader->page_size);
	(void)close(reader->pagemap_fd);
	free(reader);
}

static void *reader_main(void *argument)
{
	struct reader *reader = argument;

	/* What it says does not matter, only when it returns. */
	ssize_t got = pread(reader->pagemap_fd, reader->page, ENTRY_SIZE, 0);

	(void)got;
	reader_free(reader);
	return NULL;
}

/* Signals are for other threads: this one may not see any before it is done. */
static int reader_start(struct reader *reader)
{
	pthread_attr_t attributes;
	pthread_t thread;
	sigset_t all, before;
	int r = pthread_attr_init(&attributes);

	if (r)
		return -r;
	(void)pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &before);
	r = pthread_create(&thread, &attributes, reader_main, reader);
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	(void)pthread_attr_destroy(&attributes);
	return -r;
}

/* A page that nobody gets while the returned userfaultfd is open. */
static int page_withhold(void *page, size_t page_size)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = {
		.range = { .start = (uintptr_t)page, .len = page_size },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd < 0)
		return -errno;
	if (ioctl(fd, UFFDIO_API, &api) < 0 || ioctl(fd, UFFDIO_REGISTER, &range) < 0) {
		int error = -errno;

		(void)close(fd);
		return error;
	}
	return fd;
}

/* Returns once the reader has come to the page, with its reference. */
static int reader_wait(int uffd, int64_t deadline_ns)
{
	struct pollfd event = { .fd = uffd, .events = POLLIN };
	struct timespec left;
	int r;

	do {
		left = hu_timespec(deadline_ns - hu_monotonic_ns());
		r = ppoll(&event, 1, &left, NULL);
	} while (r < 0 && errno == EINTR);
	if (r < 0)
		return -errno;
	return r ? 0 : -ETIMEDOUT;
}

/* Takes pagemap_fd. */
static struct reader *reader_new(int pagemap_fd)
{
	const size_t page_size = (size_t)sysconf(_SC_PAGESIZE);
	struct reader *reader = malloc(sizeof(*reader));
	void *page =
		mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (!reader || page == MAP_FAILED) {
		if (page != MAP_FAILED)
			(void)munmap(page, page_size);
		free(reader);
		(void)close(pagemap_fd);
		return NULL;
	}
	(void)madvise(page, page_size, MADV_DONTFORK);
	*reader = (struct reader){ pagemap_fd, page, page_size };
	return reader;
}

int hu_address_space_hold(int32_t pid, int64_t timeout_ns)
{
	const int64_t deadline_ns = hu_deadline_ns(timeout_ns);
	uint64_t entry;
	int pagemap_fd = hu_proc_open(pid, "pagemap", O_RDONLY);

	if (pagemap_fd < 0)
		return pagemap_fd;

	ssize_t got = pread(pagemap_fd, &entry, ENTRY_SIZE, 0);

	if (got <= 0) { /* nothing: it has no address space, or none any more */
		int error = got < 0 ? -errno : -ESRCH;

		(void)close(pagemap_fd);
		return error;
	}

	struct reader *reader = reader_new(pagemap_fd);

	if (!reader)
		return -ENOMEM;

	int fd = page_withhold(reader->page, reader->page_size);
	int r = fd < 0 ? fd : reader_start(reader);

	if (r < 0) {
		reader_free(reader);
	} else {
		r = reader_wait(fd, deadline_ns); /* the reader frees itself from here on */
		if (r == 0)
			return fd;
	}
	if (fd >= 0)
		(void)close(fd);
	return r;
}
