"""One thread for tests and the processes they start: on small tensors, several mostly wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
