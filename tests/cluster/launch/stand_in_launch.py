"""Runs `beit3 launch` with fake trainers on hosts whose names all mean this machine.

Arguments are those of `beit3 launch`. PATH contains the programs of `stand_ins`; everything else is real.
"""

import functools
import sys

from beit3_ds.cli.main import main
from beit3_ds.cluster.launch import launching

launching._own_address = lambda hosts, hostfile: "127.0.0.1"
launching.LaunchOptions = functools.partial(launching.LaunchOptions, module="tests.cluster.launch.fake_trainer")
sys.exit(main(["launch", *sys.argv[1:]]))
