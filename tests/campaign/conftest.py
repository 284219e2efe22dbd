"""Campaigns are run by hand: they take hours, and are no tests."""

collect_ignore_glob = ["*.py"]
