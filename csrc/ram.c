// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/magic.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include "ram.h"

#ifndef MADV_POPULATE_READ /* Linux 5.14, glibc 2.35 */
#define MADV_POPULATE_READ 22
#endif

int hu_proc_open(int32_t pid, const char *file, int flags)
{
	char path[64];

	if (pid <= 0)
		return -EINVAL;
	(void)snprintf(path, sizeof(path), "/proc/%" PRId32 "/%s", pid, file);

	int fd = (int)TEMP_FAILURE_RETRY(open(path, flags | O_CLOEXEC));

	if (fd >= 0)
		return fd;
	if (errno == ENOENT)
		return -ESRCH;
	if (errno == EPERM) /* map_files says so where the others say EACCES */
		return -EACCES;
	return -errno;
}

/* Lines of a file, in bounded memory: what does not fit is cut off. */
struct lines {
	int fd;
	size_t start; /* of what is in the buffer and was not returned */
	size_t end;
	char buffer[8192];
};

/* Returns 1 and the next line, 0 at the end of the file. -EBADMSG: the last line has no end. */
static int lines_next(struct lines *lines, char **ret_line)
{
	bool cut = false;

	for (;;) {
		char *line = lines->buffer + lines->start;
		size_t length = lines->end - lines->start;
		char *newline = memchr(line, '\n', length);

		if (newline) {
			lines->start = (size_t)(newline - lines->buffer) + 1;
			if (cut) /* the line's beginning was kept; this is the rest of it */
				line = lines->buffer;
			else
				*newline = '\0';
			*ret_line = line;
			return 1;
		}

		if (!cut) {
			memmove(lines->buffer, line, length);
			lines->start = 0;
			lines->end = length;
		}
		/* The upper half takes the rest of a line that is too long. */
		if (cut || lines->end == sizeof(lines->buffer)) {
			cut = true;
			lines->start = lines->end = sizeof(lines->buffer) / 2;
			lines->buffer[lines->start - 1] = '\0';
		}

		ssize_t got = TEMP_FAILURE_RETRY(read(lines->fd, lines->buffer + lines->end,
						      sizeof(lines->buffer) - lines->end));

		if (got < 0)
			return -errno;
		if (got == 0)
			return cut || length ? -EBADMSG : 0;
		lines->end += (size_t)got;
	}
}

/* A number in lower-case digits; *text is moved behind it. */
static bool parse_number(const char **text, unsigned int base, uint64_t *ret_value)
{
	const char *p = *text;
	uint64_t value = 0;

	for (;; p++) {
		unsigned int digit;

		if (*p >= '0' && *p <= '9')
			digit = (unsigned int)(*p - '0');
		else if (base == 16 && *p >= 'a' && *p <= 'f')
			digit = (unsigned int)(*p - 'a') + 10;
		else
			break;
		if (__builtin_mul_overflow(value, (uint64_t)base, &value) ||
		    __builtin_add_overflow(value, (uint64_t)digit, &value))
			return false;
	}
	if (p == *text)
		return false;
	*text = p;
	*ret_value = value;
	return true;
}

static bool parse_char(const char **text, char wanted)
{
	if (**text != wanted)
		return false;
	(*text)++;
	return true;
}

static bool starts_with(const char *text, const char *prefix)
{
	return strncmp(text, prefix, strlen(prefix)) == 0;
}

/* "7f0000000000-7f0010000000 rw-s 00000000 00:01 1041      /memfd:ram (deleted)" */
static bool parse_header(const char *line, struct hu_ram_mapping *ret_mapping)
{
	struct hu_ram_mapping mapping = { .backing = HU_RAM_ANONYMOUS };
	uint64_t end, device;

	if (!parse_number(&line, 16, &mapping.start) || !parse_char(&line, '-') ||
	    !parse_number(&line, 16, &end) || !parse_char(&line, ' ') || end <= mapping.start)
		return false;
	mapping.length_bytes = end - mapping.start;

	if (strnlen(line, 5) < 5 || (line[3] != 's' && line[3] != 'p'))
		return false;
	mapping.shared = line[3] == 's';
	line += 4;

	if (!parse_char(&line, ' ') || !parse_number(&line, 16, &mapping.offset_bytes) ||
	    !parse_char(&line, ' ') || !parse_number(&line, 16, &device) ||
	    !parse_char(&line, ':') || !parse_number(&line, 16, &device) ||
	    !parse_char(&line, ' ') || !parse_number(&line, 10, &mapping.inode))
		return false;

	line += strspn(line, " ");
	if (mapping.inode != 0) {
		(void)snprintf(mapping.path, sizeof(mapping.path), "%s", line);
		/*
		 * Shared anonymous memory is a nameless file of the kernel's own tmpfs
		 * (shmem_zero_setup in mm/shmem.c), and so is a memfd.
		 */
		if (starts_with(line, "/memfd:"))
			mapping.backing = HU_RAM_MEMFD;
		else if (strcmp(line, "/dev/zero (deleted)") != 0)
			mapping.backing = HU_RAM_FILE;
	}
	*ret_mapping = mapping;
	return true;
}

/* "  123 kB", added to *bytes. */
static bool parse_size(const char *text, uint64_t *bytes)
{
	uint64_t kilobytes, size;

	text += strspn(text, " ");
	return parse_number(&text, 10, &kilobytes) && strcmp(text, " kB") == 0 &&
	       !__builtin_mul_overflow(kilobytes, (uint64_t)1024, &size) &&
	       !__builtin_add_overflow(*bytes, size, bytes);
}

struct vm_flags {
	bool dontcopy;
	bool device; /* memory of a device, mapped */
	bool hugetlb;
};

/* " rd wr sh mr mw me ms dc hg" */
static struct vm_flags parse_flags(const char *text)
{
	struct vm_flags flags = { 0 };

	for (text += strspn(text, " "); *text; text += strspn(text, " ")) {
		size_t length = strcspn(text, " ");

		if (length == 2) {
			flags.dontcopy |= memcmp(text, "dc", 2) == 0;
			flags.device |= memcmp(text, "io", 2) == 0 || memcmp(text, "pf", 2) == 0;
			flags.hugetlb |= memcmp(text, "ht", 2) == 0;
		}
		text += length;
	}
	return flags;
}

/* One line below a mapping's first. Lines that are not known are passed over. */
static bool parse_field(const char *line, struct hu_ram_mapping *mapping)
{
	const char *colon = strchr(line, ':');

	if (!colon)
		return false;
	/* "Rss" leaves out huge pages of hugetlbfs (smaps_hugetlb_range in fs/proc/task_mmu.c). */
	if (starts_with(line, "Rss:") || starts_with(line, "Shared_Hugetlb:") ||
	    starts_with(line, "Private_Hugetlb:"))
		return parse_size(colon + 1, &mapping->resident_bytes);
	if (starts_with(line, "Swap:"))
		return parse_size(colon + 1, &mapping->swapped_bytes);
	if (starts_with(line, "Locked:"))
		return parse_size(colon + 1, &mapping->locked_bytes);
	return true;
}

/*
 * A QEMU's RAM blocks are the mappings marked "dc", VM_DONTCOPY: ram_block_add (softmmu/physmem.c
 * up to QEMU 8.1, system/physmem.c since) calls madvise(MADV_DONTFORK) for the whole of each block
 * that has memory, RAM, ROM and video memory alike, whoever allocated it and whatever the
 * accelerator. Nothing else in QEMU does. Compared block by block with "info ramblock" of QEMU 7.2
 * for anonymous, memfd, tmpfs, shared anonymous and private file memory. Exceptions, by source:
 *
 * - A device's memory mapped for the guest (memory_region_init_ram_device_ptr: the BARs of VFIO
 *   devices) goes the same way. Its mapping has "io" or "pf" (VM_IO, VM_PFNMAP); it is not RAM, is
 *   not readable by others and is left out here.
 * - With -accel qtest no block is marked: such a QEMU has no RAM blocks to our eye.
 * - A page remapped after a memory error (qemu_ram_remap, at the next reset of the guest) loses
 *   the mark and splits its block in two rows.
 */
int hu_ram_parse(int fd, struct hu_ram_mapping *ret_mappings, size_t capacity)
{
	struct lines lines = { .fd = fd };
	struct hu_ram_mapping mapping;
	bool open = false; /* a mapping was begun, its flags are still to come */
	size_t count = 0;
	char *line = lines.buffer;
	int r;

	while ((r = lines_next(&lines, &line)) > 0) {
		if (*line < 'A' || *line > 'Z') {
			if (open || !parse_header(line, &mapping))
				return -EBADMSG;
			open = true;
			continue;
		}
		if (!open)
			return -EBADMSG;
		if (!starts_with(line, "VmFlags:")) {
			if (!parse_field(line, &mapping))
				return -EBADMSG;
			continue;
		}

		struct vm_flags flags = parse_flags(line + strlen("VmFlags:"));

		open = false; /* always the last line, show_smap in fs/proc/task_mmu.c */
		if (!flags.dontcopy || flags.device)
			continue;
		if (flags.hugetlb)
			mapping.backing = HU_RAM_HUGETLB;
		if (count == capacity || count == INT_MAX)
			return -E2BIG;
		ret_mappings[count++] = mapping;
	}
	if (r < 0)
		return r;
	return open ? -EBADMSG : (int)count;
}

/*
 * smaps of a process that has ended just ends, be it in the middle (m_start in fs/proc/task_mmu.c).
 * A process's memory does not come back: if there is some now, there was when the end was read.
 */
static int memory_exists(int smaps_fd)
{
	char byte;
	ssize_t got = TEMP_FAILURE_RETRY(pread(smaps_fd, &byte, 1, 0));

	if (got < 0)
		return -errno;
	return got ? 0 : -ESRCH;
}

int hu_ram_open_file(int32_t pid, const struct hu_ram_mapping *mapping, int flags)
{
	char file[64];

	(void)snprintf(file, sizeof(file), "map_files/%" PRIx64 "-%" PRIx64, mapping->start,
		       mapping->start + mapping->length_bytes);

	int fd = hu_proc_open(pid, file, flags);

	if (fd != -ESRCH)
		return fd;

	/* Which of the two is not there, the process or the mapping? */
	cleanup_close int smaps_fd = hu_proc_open(pid, "smaps", O_RDONLY);

	if (smaps_fd < 0)
		return smaps_fd;

	int r = memory_exists(smaps_fd);

	return r < 0 ? r : -ENOENT;
}

static int tell_file_system(int32_t pid, struct hu_ram_mapping *mapping)
{
	cleanup_close int fd = hu_ram_open_file(pid, mapping, O_PATH);
	struct statfs fs;

	if (fd < 0)
		return fd == -ENOENT ? -EAGAIN : fd;
	if (TEMP_FAILURE_RETRY(fstatfs(fd, &fs)) < 0)
		return -errno;
	if ((unsigned long)fs.f_type == TMPFS_MAGIC)
		mapping->backing = HU_RAM_SHMEM;
	return 0;
}

int hu_ram_mappings(int32_t pid, struct hu_ram_mapping *ret_mappings, size_t capacity)
{
	cleanup_close int fd = hu_proc_open(pid, "smaps", O_RDONLY);

	if (fd < 0)
		return fd;

	int count = hu_ram_parse(fd, ret_mappings, capacity);

	if (count < 0)
		return count;

	int r = memory_exists(fd);

	for (int i = 0; r == 0 && i < count; i++) {
		if (ret_mappings[i].backing == HU_RAM_FILE)
			r = tell_file_system(pid, &ret_mappings[i]);
	}
	return r < 0 ? r : count;
}

int hu_ram_open(int32_t pid, const struct hu_ram_mapping *mapping)
{
	/* What a guest wrote to private memory is not in the file. */
	if (!mapping->shared)
		return -EINVAL;
	return hu_ram_open_file(pid, mapping, O_RDONLY);
}

int hu_extent_next(int fd, uint64_t from, uint64_t end, uint64_t *ret_start, uint64_t *ret_stop)
{
	if (from >= end)
		return 0;

	off_t start = lseek(fd, (off_t)from, SEEK_DATA);

	if (start < 0)
		return errno == ENXIO ? 0 : -errno;
	if ((uint64_t)start >= end)
		return 0;

	off_t stop = lseek(fd, start, SEEK_HOLE);

	if (stop < 0)
		return errno == ENXIO ? 0 : -errno; /* cut off in the meantime */

	*ret_start = (uint64_t)start;
	*ret_stop = (uint64_t)stop < end ? (uint64_t)stop : end;
	return 1;
}

/* Faults in [start, stop) of the mapping, which locks it. */
static int populate(char *base, uint64_t start, uint64_t stop)
{
	int r = (int)TEMP_FAILURE_RETRY(madvise(base + start, stop - start, MADV_POPULATE_READ));

	/* Before Linux 5.14: the same, at the price of a split mapping. */
	if (r < 0 && errno == EINVAL)
		r = mlock(base + start, stop - start);
	return r < 0 ? -errno : 0;
}

static int lock_data(int fd, struct hu_ram_lock *lock)
{
	const uint64_t page_mask = (uint64_t)sysconf(_SC_PAGESIZE) - 1;
	uint64_t from = 0, start, stop;
	int r;

	while ((r = hu_extent_next(fd, from, lock->length_bytes, &start, &stop)) > 0) {
		from = stop;
		/* Extents of a file system with blocks smaller than pages. */
		start &= ~page_mask;
		stop = (stop + page_mask) & ~page_mask;
		if (start == stop)
			continue;

		r = populate(lock->base, start, stop);
		if (r < 0)
			return r;
		lock->locked_bytes += stop - start;
	}
	return r;
}

/*
 * mlock of the whole would read, and so make, every page that a guest has never touched. Locking
 * each stretch of data by mlock makes a mapping of each, and a process may have 65,530
 * (vm.max_map_count). So the whole is marked "locked when faulted in" and only data is faulted in.
 */
int hu_ram_lock(int32_t fd, struct hu_ram_lock *ret_lock)
{
	struct hu_ram_lock lock = { 0 };
	struct statfs fs;
	struct stat st;

	if (fstat(fd, &st) < 0 || TEMP_FAILURE_RETRY(fstatfs(fd, &fs)) < 0)
		return -errno;
	if (st.st_size == 0 || (unsigned long)fs.f_type == HUGETLBFS_MAGIC) {
		*ret_lock = lock;
		return 0;
	}

	lock.length_bytes = (uint64_t)st.st_size;
	lock.base = mmap(NULL, lock.length_bytes, PROT_READ, MAP_SHARED, fd, 0);
	if (lock.base == MAP_FAILED)
		return -errno;

	int r = 0;

	if (madvise(lock.base, lock.length_bytes, MADV_DONTFORK) < 0 ||
	    mlock2(lock.base, lock.length_bytes, MLOCK_ONFAULT) < 0)
		r = -errno;
	if (r == 0)
		r = lock_data(fd, &lock);
	if (r < 0) {
		(void)munmap(lock.base, lock.length_bytes); /* unlocks */
		return r;
	}
	*ret_lock = lock;
	return 0;
}

int hu_ram_unlock(const struct hu_ram_lock *lock)
{
	if (lock->base && munmap(lock->base, lock->length_bytes) < 0)
		return -errno;
	return 0;
}
