"""Contains launch environment, rendezvous, process group, heartbeat, watchdog and stop signals of the ranks."""
