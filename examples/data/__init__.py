"""Data sets as sequences.

What all share is in `base`, and one file is one kind of data: `images`, `audio`, `text`, `language`,
`retrieval`, `forecast`, `memory`, and `arena` over what makes its rows, `listops` and `pathfinder`.
Nothing is imported here: the processes that make rows do without torch.
"""
