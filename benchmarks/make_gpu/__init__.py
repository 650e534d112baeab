"""What `make gpu` is made of: its environment, the record of its tests and the table at its end.

`image.txt` lists what the machine has that `make gpu-bundle` fills up. Nothing is imported here: it runs
before anything is installed.
"""
