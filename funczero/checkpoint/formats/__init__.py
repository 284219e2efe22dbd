"""Files that others write and read: what each of them is, leaf by leaf, without running anything that is in one."""
