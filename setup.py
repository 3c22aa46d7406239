"""Packages of two roots: `beit3_ds/` and `kernels/`, which is installed as `beit3_ds.kernels`.

A top-level module named `kernels` would shadow a package that transformers looks for. Nothing is compiled.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["beit3_ds", "beit3_ds.*"]), "beit3_ds.kernels"],
    package_dir={"beit3_ds": "beit3_ds", "beit3_ds.kernels": "kernels"},
)
