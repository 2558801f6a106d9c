/*
 * guest.c - everything that runs in a lab guest besides busybox and qemu-ga.
 *
 * As pid 1 it mounts, loads the modules named in /modules, and keeps two
 * children alive: qemu-ga and the witness. The witness stamps seeded words
 * into every page of a part of the guest's RAM, verifies them for ever in
 * small chunks, and says on the serial console that it lives:
 *
 *	READY pages=24000 seed=0123456789abcdef rate_ms=200
 *	TICK seq=7 mono=... real=... passes=0 bad=0 gap=...
 *
 * mono and real are nanoseconds, gap is the worst distance between two ticks
 * so far (CLOCK_MONOTONIC, ns). Kernel command line: hu.fill=50% | BYTES[KMG],
 * hu.rate=MS, hu.load=1 (a child that spins at nice 19).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define CONSOLE "/dev/ttyS0"
#define AGENT_PORT "org.qemu.guest_agent.0"
#define AGENT_LINK "/dev/virtio-ports/" AGENT_PORT
#define PAGE ((size_t)4096)
#define PASS_MS 10000 /* one verification of all pages takes about so long */
#define BAD_LINES 10 /* so many mismatches are described one by one */
#define AGENT_SLACK_NS 400000000UL
#define NS 1000000000LL

struct options {
	uint64_t fill; /* bytes, or percent of the free RAM */
	bool fill_percent;
	unsigned rate_ms;
	bool load;
};

/* A console that is never waited for: a line goes out whole or not at all. */
struct line {
	int fd;
	char text[256];
	size_t sent, size;
};

static int64_t now_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (int64_t)t.tv_sec * NS + t.tv_nsec;
}

static void sleep_ms(long ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000 };

	while (nanosleep(&t, &t) && errno == EINTR)
		;
}

static void sleep_until(int64_t mono)
{
	struct timespec t = { mono / NS, mono % NS };

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
		;
}

/* true when nothing of an earlier line is left to send */
static bool line_flush(struct line *line)
{
	while (line->sent < line->size) {
		ssize_t n = write(line->fd, line->text + line->sent, line->size - line->sent);

		if (n <= 0)
			return false;
		line->sent += (size_t)n;
	}
	return true;
}

__attribute__((format(printf, 2, 3))) static void line_print(struct line *line, const char *format,
							     ...)
{
	va_list args;
	int n;

	if (!line_flush(line))
		return;
	va_start(args, format);
	n = vsnprintf(line->text, sizeof(line->text), format, args);
	va_end(args);
	line->sent = 0;
	line->size = n < (int)sizeof(line->text) ? (size_t)n : sizeof(line->text) - 1;
	line_flush(line);
}

static void line_open(struct line *line)
{
	struct termios mode;

	line->fd = open(CONSOLE, O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	if (line->fd >= 0 && !tcgetattr(line->fd, &mode)) {
		cfmakeraw(&mode);
		tcsetattr(line->fd, TCSANOW, &mode);
	}
}

static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 33) * 0xff51afd7ed558ccdULL;
	x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ULL;
	return x ^ x >> 33;
}

static size_t fill_bytes(const struct options *options)
{
	struct sysinfo info;
	uint64_t room, bytes;

	sysinfo(&info);
	room = (uint64_t)info.freeram * info.mem_unit;
	bytes = options->fill_percent ? room / 100 * options->fill : options->fill;
	/* The kernel, the agent and page tables need a rest to live in. */
	if (bytes > room / 10 * 9)
		bytes = room / 10 * 9;
	return (size_t)bytes & ~(PAGE - 1);
}

static void witness(const struct options *options)
{
	const size_t words = PAGE / sizeof(uint64_t);
	uint64_t seed = 0, passes = 0, bad = 0, seq = 0;
	struct line line = { .fd = -1 };
	int64_t last = 0, worst = 0;
	size_t bytes, pages, chunk, at = 0;
	int64_t rate = (int64_t)options->rate_ms * 1000000, next;
	uint64_t *ram;

	line_open(&line);
	if (getrandom(&seed, sizeof(seed), GRND_NONBLOCK) != sizeof(seed))
		seed = (uint64_t)now_ns(CLOCK_REALTIME);
	bytes = fill_bytes(options);
	ram = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (ram == MAP_FAILED) {
		line_print(&line, "FAIL no memory: %zu bytes\n", bytes);
		return;
	}
	pages = bytes / PAGE;
	for (size_t i = 0; i < pages; i++) {
		ram[i * words] = mix(seed + i);
		ram[i * words + words - 1] = mix(seed ^ i);
	}
	chunk = pages * options->rate_ms / PASS_MS + 1;
	line_print(&line, "READY pages=%zu seed=%016llx rate_ms=%u\n", pages,
		   (unsigned long long)seed, options->rate_ms);
	next = now_ns(CLOCK_MONOTONIC);
	for (;;) {
		int64_t mono = now_ns(CLOCK_MONOTONIC);

		if (last && mono - last > worst)
			worst = mono - last;
		last = mono;
		line_print(&line,
			   "TICK seq=%llu mono=%lld real=%lld passes=%llu bad=%llu gap=%lld\n",
			   (unsigned long long)seq++, (long long)mono,
			   (long long)now_ns(CLOCK_REALTIME), (unsigned long long)passes,
			   (unsigned long long)bad, (long long)worst);
		for (size_t i = 0; i < chunk; i++) {
			if (ram[at * words] != mix(seed + at) ||
			    ram[at * words + words - 1] != mix(seed ^ at)) {
				if (bad++ < BAD_LINES)
					line_print(&line, "BAD page=%zu\n", at);
			}
			if (++at == pages) {
				at = 0;
				passes++;
			}
		}
		/* After a stall start afresh: a burst of ticks tells nothing. */
		next += rate;
		if (next < mono)
			next = mono + rate;
		sleep_until(next);
	}
}

/* Without udev nobody names the virtio-serial ports. */
static bool agent_port_link(void)
{
	glob_t found;
	bool linked = false;

	if (glob("/sys/class/virtio-ports/*/name", 0, NULL, &found))
		return false;
	for (size_t i = 0; i < found.gl_pathc && !linked; i++) {
		char name[64], port[32], target[64];
		FILE *file = fopen(found.gl_pathv[i], "re");

		if (!file)
			continue;
		if (fscanf(file, "%63s", name) == 1 && !strcmp(name, AGENT_PORT) &&
		    sscanf(found.gl_pathv[i], "/sys/class/virtio-ports/%31[^/]", port) == 1) {
			snprintf(target, sizeof(target), "/dev/%s", port);
			linked = !symlink(target, AGENT_LINK) || errno == EEXIST;
		}
		fclose(file);
	}
	globfree(&found);
	return linked;
}

static void agent(const struct options *options)
{
	(void)options;
	for (int i = 0; i < 500 && !agent_port_link(); i++)
		sleep_ms(20);
	/*
	 * While no host is connected qemu-ga looks ten times a second; this
	 * lets it look when a tick has woken the vCPU anyhow.
	 */
	prctl(PR_SET_TIMERSLACK, AGENT_SLACK_NS, 0, 0, 0);
	execl("/usr/sbin/qemu-ga", "qemu-ga", "-m", "virtio-serial", "-p", AGENT_LINK, "-t", "/run",
	      (char *)NULL);
}

static void spin(const struct options *options)
{
	(void)options;
	(void)!nice(19);
	for (volatile uint64_t n = 0;; n++)
		;
}

static void load_modules(void)
{
	char path[128];
	FILE *list = fopen("/modules", "re");

	while (list && fscanf(list, "%127s", path) == 1) {
		int fd = open(path, O_RDONLY | O_CLOEXEC);

		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
			fprintf(stderr, "module %s: %s\n", path, strerror(errno));
		if (fd >= 0)
			close(fd);
	}
	if (list)
		fclose(list);
}

static void read_options(struct options *options)
{
	char text[2048] = "", *word, *rest = text, *end;
	FILE *file = fopen("/proc/cmdline", "re");

	if (!file || !fgets(text, sizeof(text), file))
		return;
	fclose(file);
	while ((word = strsep(&rest, " \n"))) {
		if (!strncmp(word, "hu.fill=", 8)) {
			options->fill = strtoull(word + 8, &end, 0);
			options->fill_percent = *end == '%';
			options->fill <<= *end == 'K' ? 10 :
					  *end == 'M' ? 20 :
					  *end == 'G' ? 30 :
							0;
		} else if (!strncmp(word, "hu.rate=", 8)) {
			options->rate_ms = (unsigned)strtoul(word + 8, NULL, 0);
		} else if (!strncmp(word, "hu.load=", 8)) {
			options->load = word[8] == '1';
		}
	}
	if (!options->rate_ms || options->rate_ms > PASS_MS)
		options->rate_ms = 200;
}

static pid_t start(void (*run)(const struct options *), const struct options *options)
{
	pid_t pid = fork();

	if (pid)
		return pid;
	run(options);
	_exit(1);
}

int main(void)
{
	struct options options = { .fill = 50, .fill_percent = true, .rate_ms = 200 };
	pid_t agent_pid;
	int fd;

	mount("dev", "/dev", "devtmpfs", 0, NULL);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sys", "/sys", "sysfs", 0, NULL);
	mount("run", "/run", "tmpfs", 0, "mode=755");
	mkdir("/dev/virtio-ports", 0755);
	fd = open("/dev/console", O_RDWR);
	for (int i = 0; i < 3 && fd >= 0; i++)
		dup2(fd, i);
	setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin", 1);
	setenv("HOME", "/root", 1);
	load_modules();
	read_options(&options);
	if (options.load)
		start(spin, &options);
	agent_pid = start(agent, &options);
	start(witness, &options);
	for (;;) {
		if (wait(NULL) != agent_pid)
			continue;
		sleep_ms(500);
		agent_pid = start(agent, &options);
	}
}
