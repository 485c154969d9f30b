"""What a run is put through to earn trust: kills, corruptions, full disks.

config.py          which trials, how many of each
courses.py         a run that is taken again and again, and what it computes undisturbed
launched.py        the training command in processes of its own
slowed.py          the same with a part that takes long
kills.py  terminations.py  several_hosts.py  elastic.py  restores.py  poisons.py  disks.py     a trial each
corruptions.py     ways that checkpoints go bad, for restores.py
mounted.py         what disks.py does where it may mount disks
page.py            RELIABILITY.md
"""
