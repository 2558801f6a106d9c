/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Named places at which tests make the C core fail or stand still, as hostupdate.faults does for
 * Python: HOSTUPDATE_FAULT=PLACE=fail or PLACE=stop. Compiled in only with HU_FAULTS defined, which
 * ffi_build.py does where HOSTUPDATE_FAULTS=1 is set; an installed package has none of it.
 */
#ifndef HOSTUPDATE_FAULT_H
#define HOSTUPDATE_FAULT_H

#ifdef HU_FAULTS

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* 0, or -EIO where the place is to fail. */
static inline int hu_fault(const char *place)
{
	const char *wanted = getenv("HOSTUPDATE_FAULT");
	size_t length = strlen(place);

	if (!wanted || strncmp(wanted, place, length) != 0)
		return 0;
	if (strcmp(wanted + length, "=stop") == 0)
		(void)kill(getpid(), SIGSTOP);
	return strcmp(wanted + length, "=fail") == 0 ? -EIO : 0;
}

#else

static inline int hu_fault(const char *place)
{
	(void)place;
	return 0;
}

#endif
#endif
