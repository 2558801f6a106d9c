// SPDX-License-Identifier: Apache-2.0
/* WRAP: mlock2 madvise lseek mmap pread */
/* Guest RAM: the smaps parser against fixtures and garbage, and all calls on real memory. */
#include <inttypes.h>

#include "ram.h"
#include "test.h"

#define MIB (1024L * 1024)

WRAPPER(int, -1, mlock2, (const void *addr, size_t length, unsigned int flags),
	(addr, length, flags))
WRAPPER(int, -1, madvise, (void *addr, size_t length, int advice), (addr, length, advice))
WRAPPER(off_t, -1, lseek, (int fd, off_t offset, int whence), (fd, offset, whence))
WRAPPER(void *, MAP_FAILED, mmap,
	(void *addr, size_t length, int prot, int flags, int fd, off_t offset),
	(addr, length, prot, flags, fd, offset))

ssize_t __real_pread(int fd, void *buffer, size_t length, off_t offset);
ssize_t __wrap_pread(int fd, void *buffer, size_t length, off_t offset);
static struct injection inject_pread;
static bool at_end; /* the next pread finds nothing more */

ssize_t __wrap_pread(int fd, void *buffer, size_t length, off_t offset)
{
	if (injected(&inject_pread))
		return -1;
	if (at_end) {
		at_end = false;
		return 0;
	}
	return __real_pread(fd, buffer, length, offset);
}

/* ---- the parser ---- */

static const char fixture[] =
	"55c0a0000000-55c0a0200000 r-xp 00000000 fe:00 131 /usr/bin/qemu-system-x86_64\n"
	"Size:               2048 kB\nKernelPageSize:        4 kB\nRss:                 512 kB\n"
	"Swap:                  0 kB\nLocked:                0 kB\nVmFlags: rd ex mr mw me \n"
	"7f3a00000000-7f3a10000000 rw-s 00001000 00:01 1041                       /memfd:ram (deleted)\n"
	"Size:             262144 kB\nKernelPageSize:        4 kB\nRss:                1234 kB\n"
	"Pss:                1000 kB\nShared_Hugetlb:        0 kB\nPrivate_Hugetlb:       0 kB\n"
	"Swap:                 56 kB\nSwapPss:               1 kB\nLocked:               78 kB\n"
	"THPeligible:           0\nProtectionKey:         0\nVmFlags: rd wr sh mr mw me ms dc hg \n"
	"7f3a20000000-7f3a20001000 rw-p 00000000 00:00 0 \n"
	"Rss:                   4 kB\nVmFlags: rd wr mr mw me dc ac \n"
	"7f3a30000000-7f3a30001000 rw-p 00000000 00:00 0 \n"
	"Rss:                   4 kB\nVmFlags: rd wr mr mw me ac \n"
	"7f3a40000000-7f3a40100000 rw-s e0000000 00:0e 1050   anon_inode:[vfio-device]\n"
	"Rss:                   0 kB\nVmFlags: rd wr sh mr mw me ms pf io dc de dd \n"
	"7f3a50000000-7f3a90000000 rw-s 00000000 00:11 77     /dev/hugepages/libvirt/a b\n"
	"KernelPageSize:     2048 kB\nRss:                   0 kB\nShared_Hugetlb:     4096 kB\n"
	"Private_Hugetlb:    2048 kB\nVmFlags: rd wr sh mr mw me ms dc de ht \n"
	"7f3b00000000-7f3b10000000 rw-s 00000000 00:01 9      /dev/zero (deleted)\n"
	"VmFlags: rd wr sh mr mw me ms dc \n"
	"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0       [vsyscall]\nVmFlags: ex \n";

static int parse(const void *text, size_t length, struct hu_ram_mapping *ret, size_t capacity)
{
	cleanup_close int fd = memfd_create("smaps", MFD_CLOEXEC);

	CHECK(fd >= 0 && write(fd, text, length) == (ssize_t)length);
	CHECK(__real_lseek(fd, 0, SEEK_SET) == 0);
	return hu_ram_parse(fd, ret, capacity);
}

static int parse_text(const char *text)
{
	struct hu_ram_mapping mappings[8];

	return parse(text, strlen(text), mappings, 8);
}

static void test_parse(void)
{
	struct hu_ram_mapping m[4];

	CHECK(parse(fixture, strlen(fixture), m, 4) == 4);
	CHECK(m[0].start == 0x7f3a00000000 && m[0].length_bytes == 256UL * MIB);
	CHECK(m[0].offset_bytes == 0x1000 && m[0].inode == 1041 && m[0].shared);
	CHECK(m[0].resident_bytes == 1234 * 1024 && m[0].swapped_bytes == 56 * 1024);
	CHECK(m[0].locked_bytes == 78 * 1024 && m[0].backing == HU_RAM_MEMFD);
	CHECK(strcmp(m[0].path, "/memfd:ram (deleted)") == 0);
	CHECK(m[1].start == 0x7f3a20000000 && m[1].backing == HU_RAM_ANONYMOUS);
	CHECK(!m[1].shared && m[1].path[0] == '\0' && m[1].resident_bytes == 4096);
	CHECK(m[2].backing == HU_RAM_HUGETLB && m[2].resident_bytes == 6UL * MIB);
	CHECK(strcmp(m[2].path, "/dev/hugepages/libvirt/a b") == 0);
	CHECK(m[3].backing == HU_RAM_ANONYMOUS && m[3].shared);

	CHECK(parse(fixture, strlen(fixture), m, 3) == -E2BIG);
	CHECK(parse("", 0, m, 0) == 0);
}

static void test_parse_refuses(void)
{
	static const char *const bad[] = {
		"nonsense\n",
		"Rss: 4 kB\n",
		"\n",
		"1000-2000 rw-p 0 0:0 0", /* no end of line */
		"1000-2000 rw-p 0 0:0 0\n", /* no flags */
		"1000-2000 rw-p 0 0:0 0\n2000-3000 rw-p 0 0:0 0\nVmFlags: dc\n",
		"1000-2000 rw-p 0 0:0 0\nno colon\nVmFlags: dc\n",
		"1000-2000 rw-p 0 0:0 0\nRss\nVmFlags: dc\n",
		"1000-2000 rw-p 0 0:0 0\nRss: 4\nVmFlags: dc\n",
		"1000-2000 rw-p 0 0:0 0\nRss: -4 kB\nVmFlags: dc\n",
		"1000-2000 rw-p 0 0:0 0\nRss: 18446744073709551615 kB\nVmFlags: dc\n",
		"1000-2000 rw-p 0 0:0 0\nRss: 99999999999999999999 kB\nVmFlags: dc\n",
		"2000-2000 rw-p 0 0:0 0\nVmFlags: dc\n",
		"2000-1000 rw-p 0 0:0 0\nVmFlags: dc\n",
		"1000-20000000000000000 rw-p 0 0:0 0\nVmFlags: dc\n",
		"1000-2000 rw\nVmFlags: dc\n",
		"1000-2000 rw-x 0 0:0 0\nVmFlags: dc\n",
		"1000-2000 rw-p 0 0:0\nVmFlags: dc\n",
		"1000-2000 rw-p 0 0 0\nVmFlags: dc\n",
		"1000-2000 rw-p  0:0 0\nVmFlags: dc\n",
	};

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		if (parse_text(bad[i]) != -EBADMSG)
			fprintf(stderr, "taken for good: %s\n", bad[i]);
		CHECK_INT(parse_text(bad[i]), -EBADMSG);
	}
	CHECK(parse_text("1000-2000 rw-p 0 0:0 0\nVmFlags: dc\n") == 1);
	CHECK(parse_text("1000-2000 rw-p 0 0:0 0\nVmFlags:\n") == 0);
	CHECK(parse_text("1000-2000 rw-p 0 0:0 0\nVmFlags: dcx d cdc\n") == 0);
}

static void test_parse_cut_anywhere(void)
{
	struct hu_ram_mapping m[4];

	for (size_t length = 0; length < strlen(fixture); length++) {
		int r = parse(fixture, length, m, 4);
		bool whole = length == 0 || (fixture[length - 1] == '\n' &&
					     (fixture[length] < 'A' || fixture[length] > 'Z'));

		CHECK(whole ? r >= 0 : r == -EBADMSG);
	}
}

static void test_parse_garbage(void)
{
	char text[sizeof(fixture)];
	struct hu_ram_mapping m[4];
	uint32_t random = 1;

	for (int round = 0; round < 3000; round++) {
		memcpy(text, fixture, sizeof(text));
		for (int i = 0; i <= round % 5; i++) {
			random = random * 1664525 + 1013904223;
			text[(random >> 8) % (sizeof(text) - 1)] = (char)(random >> 3);
		}
		int r = parse(text, sizeof(text) - 1, m, 4);

		CHECK(r == -EBADMSG || r == -E2BIG || (r >= 0 && r <= 4));
	}
	for (int round = 0; round < 300; round++) {
		for (size_t i = 0; i < sizeof(text); i++) {
			random = random * 1664525 + 1013904223;
			text[i] = (char)(random >> 24);
		}
		CHECK(parse(text, sizeof(text), m, 4) == -EBADMSG);
	}
}

/* Lines around and above the size of the parser's buffer. */
static void test_parse_long_lines(void)
{
	static const size_t lengths[] = { 200, 4090, 8100, 8150, 8191, 8192, 8193, 20000, 70000 };
	static const char head[] = "1000-2000 rw-s 0 0:0 5 /";
	static const char tail[] =
		"\nRss: 8 kB\nVmFlags: dc\n3000-4000 rw-p 0 0:0 0\nVmFlags: dc\n";
	static char text[80000];

	for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
		struct hu_ram_mapping m[2];
		size_t length = sizeof(head) - 1;

		memcpy(text, head, length);
		memset(text + length, 'x', lengths[i]);
		length += lengths[i];
		memcpy(text + length, tail, sizeof(tail) - 1);
		length += sizeof(tail) - 1;

		CHECK(parse(text, length, m, 2) == 2);
		CHECK(m[0].inode == 5 && m[0].resident_bytes == 8192 && m[1].start == 0x3000);
		CHECK(strlen(m[0].path) == (lengths[i] < 255 ? lengths[i] + 1 : 255));
		/* The file ends within the line. */
		CHECK(parse(text, sizeof(head) + lengths[i] / 2, m, 2) == -EBADMSG);
	}
}

static void test_parse_read_error(void)
{
	struct hu_ram_mapping m[1];
	cleanup_close int directory = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	CHECK(hu_ram_parse(directory, m, 1) == -EISDIR);
	CHECK(hu_ram_parse(-1, m, 1) == -EBADF);
}

/* ---- a QEMU: a child with memory of each kind, marked as QEMU does ---- */

enum kind {
	PRIVATE,
	MEMFD,
	SHARED,
	TMPFS,
	DISK,
	KINDS
};

struct qemu {
	pid_t pid;
	uint64_t start[KINDS];
};

static void *qemu_memory(int fd, int flags)
{
	char *memory = __real_mmap(NULL, MIB, PROT_READ | PROT_WRITE, flags, fd, 0);

	CHECK(memory != MAP_FAILED);
	CHECK(__real_madvise(memory, MIB, MADV_DONTFORK) == 0);
	memory[3 * 4096] = 'g';
	return memory;
}

static int make_file(const char *directory)
{
	int fd = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

	CHECK(fd >= 0 && ftruncate(fd, MIB) == 0);
	CHECK(pwrite(fd, "file", 4, 5 * 4096) == 4);
	return fd;
}

static struct qemu qemu_start(void)
{
	struct qemu qemu;
	cleanup_close int tmpfs_fd = make_file("/dev/shm");
	cleanup_close int disk_fd = make_file(".");
	int channel[2];

	CHECK(pipe2(channel, O_CLOEXEC) == 0);
	qemu.pid = fork();
	CHECK(qemu.pid >= 0);
	if (qemu.pid == 0) {
		int memfd = memfd_create("guest", MFD_CLOEXEC);
		uint64_t start[KINDS];

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		CHECK(memfd >= 0 && ftruncate(memfd, MIB) == 0);
		start[PRIVATE] = (uintptr_t)qemu_memory(-1, MAP_PRIVATE | MAP_ANONYMOUS);
		start[MEMFD] = (uintptr_t)qemu_memory(memfd, MAP_SHARED);
		start[SHARED] = (uintptr_t)qemu_memory(-1, MAP_SHARED | MAP_ANONYMOUS);
		start[TMPFS] = (uintptr_t)qemu_memory(tmpfs_fd, MAP_SHARED);
		start[DISK] = (uintptr_t)qemu_memory(disk_fd, MAP_PRIVATE);
		CHECK(write(channel[1], start, sizeof(start)) == sizeof(start));
		for (;;)
			(void)pause();
	}
	close(channel[1]);
	CHECK(read(channel[0], qemu.start, sizeof(qemu.start)) == sizeof(qemu.start));
	close(channel[0]);
	return qemu;
}

static void qemu_stop(struct qemu *qemu)
{
	(void)kill(qemu->pid, SIGKILL);
	(void)waitpid(qemu->pid, NULL, 0);
}

static const struct hu_ram_mapping *find(const struct hu_ram_mapping *m, int count, uint64_t start)
{
	for (int i = 0; i < count; i++) {
		if (m[i].start == start)
			return &m[i];
	}
	fprintf(stderr, "no mapping at %" PRIx64 "\n", start);
	exit(1);
}

static void test_qemu(void)
{
	static const int backings[KINDS] = { HU_RAM_ANONYMOUS, HU_RAM_MEMFD, HU_RAM_ANONYMOUS,
					     HU_RAM_SHMEM, HU_RAM_FILE };
	struct qemu qemu = qemu_start();
	struct hu_ram_mapping m[KINDS];
	int count = hu_ram_mappings(qemu.pid, m, KINDS);

	CHECK(count == KINDS);
	for (int kind = 0; count == KINDS && kind < KINDS; kind++) {
		const struct hu_ram_mapping *found = find(m, count, qemu.start[kind]);
		struct hu_ram_digest before, digest;

		CHECK(found->length_bytes == (uint64_t)MIB && found->backing == backings[kind]);
		CHECK(found->shared == (kind != PRIVATE && kind != DISK));
		CHECK(found->resident_bytes >= 4096 && found->resident_bytes < (uint64_t)MIB);

		CHECK(hu_ram_digest_process(qemu.pid, found, 0, &before) == 0);
		CHECK(before.pages == (kind == TMPFS || kind == DISK ? 2 : 1));
		CHECK(hu_ram_digest_process(qemu.pid, found, 100000, &digest) == 0);
		CHECK(memcmp(&digest, &before, sizeof(digest)) == 0);

		int fd = hu_ram_open(qemu.pid, found);

		if (!found->shared) {
			CHECK(fd == -EINVAL);
			continue;
		}
		CHECK(fd >= 0);
		CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);
		CHECK((fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY);
		CHECK(hu_ram_digest_file(fd, 0, MIB, 0, &digest) == 0);
		CHECK(memcmp(&digest, &before, sizeof(digest)) == 0);
		close(fd);
	}

	/* Digests have not made memory in the qemu. */
	struct hu_ram_mapping after[KINDS];

	CHECK(hu_ram_mappings(qemu.pid, after, KINDS) == count);
	for (int i = 0; i < count; i++) {
		CHECK(after[i].start == m[i].start);
		CHECK(after[i].resident_bytes == m[i].resident_bytes);
	}
	CHECK(hu_ram_mappings(qemu.pid, m, KINDS - 1) == -E2BIG);

	/* An unknown mapping of a live process, then a process that is no more. */
	struct hu_ram_mapping wrong = *find(m, KINDS - 1, m[0].start);

	wrong.start -= 4096;
	wrong.shared = 1;
	wrong.inode = 1;
	CHECK(hu_ram_open(qemu.pid, &wrong) == -ENOENT);
	CHECK(hu_ram_digest_process(qemu.pid, &wrong, 0, NULL) == -ENOENT);
	wrong.inode = 0;
	CHECK(hu_ram_digest_process(qemu.pid, &wrong, 0, NULL) == -EINVAL);
	wrong.shared = 0;
	wrong.start++;
	CHECK(hu_ram_digest_process(qemu.pid, &wrong, 0, NULL) == -EINVAL);

	const struct hu_ram_mapping memfd = *find(after, count, qemu.start[MEMFD]);
	const struct hu_ram_mapping private = *find(after, count, qemu.start[PRIVATE]);

	(void)kill(qemu.pid, SIGKILL);
	siginfo_t info;

	CHECK(waitid(P_PID, (id_t)qemu.pid, &info, WEXITED | WNOWAIT) == 0);
	for (int reaped = 0; reaped < 2; reaped++) {
		CHECK(hu_ram_mappings(qemu.pid, m, KINDS) == -ESRCH);
		CHECK(hu_ram_open(qemu.pid, &memfd) == -ESRCH);
		CHECK(hu_ram_digest_process(qemu.pid, &memfd, 0, NULL) == -ESRCH);
		CHECK(hu_ram_digest_process(qemu.pid, &private, 0, NULL) == -ESRCH);
		qemu_stop(&qemu);
	}
	CHECK(hu_ram_mappings(0, m, KINDS) == -EINVAL);
	CHECK(hu_ram_mappings(-1, m, KINDS) == -EINVAL);
	CHECK(hu_ram_open(-1, &memfd) == -EINVAL);
}

static void test_qemu_not_ours(void)
{
	struct qemu qemu = qemu_start();
	pid_t stranger = fork();

	CHECK(stranger >= 0);
	if (stranger == 0) {
		struct hu_ram_mapping m = {
			.start = qemu.start[MEMFD], .length_bytes = MIB, .shared = 1, .inode = 1
		};
		struct hu_ram_mapping p = { .start = qemu.start[PRIVATE], .length_bytes = MIB };

		CHECK(setresuid(65534, 65534, 65534) == 0);
		if (hu_ram_mappings(qemu.pid, &m, 1) != -EACCES)
			_exit(2);
		if (hu_ram_open(qemu.pid, &m) != -EACCES)
			_exit(3);
		if (hu_ram_digest_process(qemu.pid, &p, 0, NULL) != -EACCES)
			_exit(4);
		_exit(0);
	}
	int status;

	CHECK(waitpid(stranger, &status, 0) == stranger);
	CHECK(status == 0);
	qemu_stop(&qemu);
}

/* A process that ends while its smaps is read: the text just ends. */
static void test_qemu_vanishes(void)
{
	struct qemu qemu = qemu_start();
	struct hu_ram_mapping m[KINDS];

	at_end = true;
	CHECK(hu_ram_mappings(qemu.pid, m, KINDS) == -ESRCH);
	INJECT(pread, ESRCH, 0);
	CHECK(hu_ram_mappings(qemu.pid, m, KINDS) == -ESRCH);
	INJECT(pread, EINTR, 0);
	CHECK(hu_ram_mappings(qemu.pid, m, KINDS) == KINDS);
	qemu_stop(&qemu);
}

/* ---- lock ---- */

static int count_mappings(void)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	int lines = 0, c;

	CHECK(maps);
	while ((c = getc(maps)) != EOF)
		lines += c == '\n';
	(void)fclose(maps);
	return lines;
}

static blkcnt_t blocks(int fd)
{
	struct stat st;

	CHECK(fstat(fd, &st) == 0);
	return st.st_blocks;
}

/* 1 GiB, of which three stretches, 2 MiB in all, are data. */
static int sparse_file(void)
{
	static char data[MIB];
	int fd = memfd_create("sparse", MFD_CLOEXEC);

	memset(data, 1, sizeof(data));
	CHECK(fd >= 0 && ftruncate(fd, 1024 * MIB) == 0);
	CHECK(pwrite(fd, data, MIB, 0) == MIB);
	CHECK(pwrite(fd, data, MIB / 2, 300 * MIB) == MIB / 2);
	CHECK(pwrite(fd, data, MIB / 2, 1024 * MIB - MIB / 2) == MIB / 2);
	return fd;
}

static void test_lock(void)
{
	cleanup_close int fd = sparse_file();
	blkcnt_t before = blocks(fd);
	int mappings = count_mappings();
	struct hu_ram_lock lock;
	struct hu_ram_mapping m[32];

	CHECK(hu_ram_lock(fd, &lock) == 0);
	CHECK(lock.length_bytes == 1024UL * MIB && lock.locked_bytes == 2UL * MIB);
	CHECK(blocks(fd) == before && before == 2 * MIB / 512);
	CHECK(count_mappings() == mappings + 1);

	int count = hu_ram_mappings(getpid(), m, 32);

	CHECK(count > 0);
	const struct hu_ram_mapping *own = find(m, count, (uintptr_t)lock.base);

	CHECK(own->resident_bytes == 2UL * MIB && own->locked_bytes == 2UL * MIB);

	/* The file grows while locked, and by nothing that we do. */
	CHECK(pwrite(fd, "x", 1, 700 * MIB) == 1);
	CHECK(blocks(fd) == before + 8);
	CHECK(hu_ram_unlock(&lock) == 0);
	CHECK(count_mappings() == mappings);
}

/* More stretches of data than a process may have mappings (vm.max_map_count, 65530). */
static void test_lock_scattered(void)
{
	const int pages = 66000;
	cleanup_close int fd = memfd_create("scattered", MFD_CLOEXEC);
	struct hu_ram_lock lock;

	CHECK(fd >= 0 && ftruncate(fd, pages * 8192L) == 0);
	for (int i = 0; i < pages; i++)
		CHECK(pwrite(fd, "x", 1, i * 8192L) == 1);

	blkcnt_t before = blocks(fd);

	CHECK(hu_ram_lock(fd, &lock) == 0);
	CHECK(lock.locked_bytes == (uint64_t)pages * 4096);
	CHECK(blocks(fd) == before);
	CHECK(hu_ram_unlock(&lock) == 0);
}

static void test_lock_nothing(void)
{
	cleanup_close int fd = memfd_create("empty", MFD_CLOEXEC);
	struct hu_ram_lock lock;

	CHECK(fd >= 0);
	CHECK(hu_ram_lock(fd, &lock) == 0);
	CHECK(!lock.base && lock.length_bytes == 0 && lock.locked_bytes == 0);
	CHECK(hu_ram_unlock(&lock) == 0);

	CHECK(ftruncate(fd, MIB) == 0); /* only a hole */
	CHECK(hu_ram_lock(fd, &lock) == 0);
	CHECK(lock.base && lock.length_bytes == (uint64_t)MIB && lock.locked_bytes == 0);
	CHECK(blocks(fd) == 0);
	CHECK(hu_ram_unlock(&lock) == 0);

	CHECK(hu_ram_lock(-1, &lock) == -EBADF);
}

static void test_lock_hugetlb(void)
{
	cleanup_close int fd = memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB);
	struct hu_ram_lock lock;

	if (fd < 0 || ftruncate(fd, 2 * MIB) < 0)
		return; /* a kernel without hugetlbfs; no huge page is needed for this */
	CHECK(hu_ram_lock(fd, &lock) == 0);
	CHECK(!lock.base && lock.locked_bytes == 0);
}

/* Every call that can fail does; nothing of ours stays and the caller's struct is as it was. */
static void test_lock_fails(void)
{
	static const struct {
		struct injection *injection;
		int error;
		int skip;
	} faults[] = {
		{ &inject_mmap, ENOMEM, 0 },	{ &inject_mlock2, ENOMEM, 0 },
		{ &inject_mlock2, EAGAIN, 0 },	{ &inject_mlock2, EPERM, 0 },
		{ &inject_madvise, EINVAL, 0 }, /* MADV_DONTFORK */
		{ &inject_madvise, ENOMEM, 2 }, { &inject_madvise, EFAULT, 3 },
		{ &inject_lseek, EIO, 0 },	{ &inject_lseek, EIO, 1 },
		{ &inject_lseek, EIO, 4 },
	};
	cleanup_close int fd = sparse_file();
	int mappings = count_mappings();

	for (size_t i = 0; i < sizeof(faults) / sizeof(faults[0]); i++) {
		struct hu_ram_lock lock = { .length_bytes = 42 };

		*faults[i].injection = (struct injection){ faults[i].error, faults[i].skip, 1 };
		CHECK_INT(hu_ram_lock(fd, &lock), -faults[i].error);
		CHECK(lock.length_bytes == 42 && faults[i].injection->times == 0);
		CHECK(count_mappings() == mappings);
	}
}

/* Interrupted, and on a kernel that has no MADV_POPULATE_READ. */
static void test_lock_retries(void)
{
	cleanup_close int fd = sparse_file();
	struct hu_ram_lock lock;
	blkcnt_t before = blocks(fd);

	INJECT(madvise, EINTR, 1);
	CHECK(hu_ram_lock(fd, &lock) == 0);
	CHECK(lock.locked_bytes == 2UL * MIB);
	CHECK(hu_ram_unlock(&lock) == 0);

	INJECT(madvise, EINVAL, 2);
	CHECK(hu_ram_lock(fd, &lock) == 0);
	CHECK(lock.locked_bytes == 2UL * MIB && blocks(fd) == before);
	CHECK(hu_ram_unlock(&lock) == 0);
}

int main(void)
{
	if (geteuid() != 0) {
		fprintf(stderr, "needs root: locks memory and opens map_files\n");
		return SKIP;
	}
	test_parse();
	test_parse_refuses();
	test_parse_cut_anywhere();
	test_parse_garbage();
	test_parse_long_lines();
	test_parse_read_error();
	test_qemu();
	test_qemu_not_ours();
	test_qemu_vanishes();
	if (mlock2(NULL, 0, MLOCK_ONFAULT) < 0) {
		fprintf(stderr, "lock not tested: valgrind knows no mlock2\n");
		return 0;
	}
	test_lock();
	test_lock_scattered();
	test_lock_nothing();
	test_lock_hugetlb();
	test_lock_fails();
	test_lock_retries();
	return 0;
}
