"""Plan -> processes: the bundle on disk, launchers, and the supervisor that watches and concludes."""
