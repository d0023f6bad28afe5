__version__ = '0.1.0'

import os

os.environ.setdefault(
    'OMP_WAIT_POLICY', 'PASSIVE'
)  # waiting threads sleep: torch's and numba's would else spin against each other
