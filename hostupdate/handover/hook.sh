#!/bin/sh
# Installed by hostupdate: keeps a guest that is parked from being started by anybody else, and
# gives its RAM back to it. Guests that are not parked are none of its business.
# libvirt calls it: NAME OPERATION SUBOPERATION -, the domain's XML on standard input.
case $2/$3 in
prepare/begin | start/begin) ;;
*) exit 0 ;;
esac

refuse() {
	echo "hostupdate: $1" >&2
	exit 1
}

[ "$1" != hostupdate-hook-probe ] || refuse 'this hook is called'
cd '@STATE@' 2>/dev/null || exit 0
name=$1 operation=$2
set -- *-*
[ -e "$1" ] || exit 0
set -f

id='' uuid='' shown=''
while read -r line; do
	case $line in
	"<domain "*" id='"*) [ -n "$id" ] || id=${line#*" id='"} id=${id%%"'"*} ;;
	"<uuid>"*) [ -n "$uuid" ] || uuid=${line#"<uuid>"} uuid=${uuid%%"<"*} ;;
	*urn:hostupdate:ticket:1*) shown=$shown$line ;;
	"<memory "*) break ;;
	esac
done
[ -n "$uuid" ] || refuse "which guest $name is cannot be told"
if [ ! -f "$uuid" ]; then
	[ ! -f "name/$name" ] || refuse "the name $name is that of a parked guest"
	exit 0
fi

# PID BEGUN TICKET: the process that unparks it lives, and gave libvirt what is to be started.
# Field 22 of /proc/PID/stat is its start.
ours() {
	case $shown in
	*">$3<"*) ;;
	*) return 1 ;;
	esac
	read -r stat 2>/dev/null <"/proc/$1/stat" || return 1
	begun=$2
	# shellcheck disable=SC2086
	set -- ${stat##*) }
	case $1 in
	Z | X) return 1 ;;
	esac
	[ "${20}" = "$begun" ]
}

# SIZE INODE BLOCK
give_back() {
	file=$links/$3
	[ -f "$file" ] || refuse "$name: its RAM file $file is missing"
	found=$(stat -c '%s %i' "$file")
	[ "$found" = "$1 $2" ] ||
		refuse "$name: its RAM file $file has size and inode $found, not $1 $2"
	ln "$file" "$directory/$3" ||
		refuse "$name: its RAM file $file cannot be linked to $directory/$3"
}

run='' allowed='' directory='' links='' complete=''
while read -r word value; do
	# shellcheck disable=SC2086
	case $word in
	run) run=$value ;;
	unpark) ours $value && allowed=yes ;;
	directory) directory=$value/$id ;;
	short)
		directory=$directory-$value
		[ -z "$allowed" ] || [ "$operation" != start ] || [ -d "$directory" ] ||
			refuse "$name: libvirt keeps its RAM elsewhere than in $directory"
		;;
	links) links=$value ;;
	ram) [ -z "$allowed" ] || [ "$operation" != start ] || give_back $value ;;
	end) complete=yes ;;
	esac
done <"$uuid"
[ -n "$complete" ] || refuse "$name is parked, and $PWD/$uuid is damaged"
[ -n "$allowed" ] ||
	refuse "$name is parked by run $run: 'hostupdate resume' brings it back, nothing else does"
