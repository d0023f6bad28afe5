"""A stranger's files: one table of hostile inputs, which is the test and the page's contents.

python tests/strangers/room.py              all of them, as a table
python tests/strangers/room.py avatar NaN   those whose line has these words
python tests/strangers/room.py --out results/strangers.json
"""
