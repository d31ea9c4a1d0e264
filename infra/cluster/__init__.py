"""Ray clusters: what starts one, the jobs on it, and the checks of one."""
