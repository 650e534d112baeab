"""What trains: the model and its loss (`task`), the commands (`trainer`), and what a run keeps.

`runs` has the folder of a run, its logs and progress, `checkpoints` and `report` what is written there.
What it trains on comes from `data`, which imports nothing of this.
"""
