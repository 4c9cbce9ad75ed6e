"""Saved models and the data that they were trained on, opened to be looked at, for the console command and scripts.

errors   what a user can mend, as one sentence
files    data from the Hub, a folder or a file
data     what a run was trained on, as it is written beside its model
labels   which number each label has
rows     examples as a model reads them, in batches
models   models with the rows that they are measured on
"""
