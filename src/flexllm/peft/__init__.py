"""Bypass networks: every PEFT method that is served and trained, one file each."""
