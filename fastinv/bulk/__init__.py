"""Logged features on disk -> recovered inputs on disk: whole logs of many files, gone on with after an interruption.

features.py   files of features, read in blocks of rows
columns.py    the same for tables: Parquet, Arrow
images.py     files of images
record.py     the folder's manifest, and which shards are done
log.py        `invert_log`: reader, engine and writer at once
"""
