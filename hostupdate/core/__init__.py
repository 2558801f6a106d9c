"""The C core's face: the only package that imports ``hostupdate._core``.

``freezer`` stops and starts all guests of a host, ``keeper`` is the dead-man process, ``ram`` knows
where a guest's memory is, ``address_space`` lets it outlive a process, ``clock`` reads clocks
against each other. Whatever the C core refuses is raised as :class:`hostupdate.errors.CoreError`;
times are integer nanoseconds.
"""
