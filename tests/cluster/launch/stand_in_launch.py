"""Runs `beit3 launch` with fake trainers, on hosts whose names all mean this machine.

Its arguments are those of `beit3 launch`. PATH has the programs of `stand_ins`; nothing else is replaced.
"""

import functools
import sys

from beit3_ds.cli.main import main
from beit3_ds.cluster.launch import launching

launching._own_address = lambda hosts, hostfile: "127.0.0.1"
launching.LaunchOptions = functools.partial(launching.LaunchOptions, module="tests.cluster.launch.fake_trainer")
sys.exit(main(["launch", *sys.argv[1:]]))
