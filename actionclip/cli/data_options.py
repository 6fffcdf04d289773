"""Options that say which data set a command works on, and the data set that they name."""

import argparse
from typing import Any

from actionclip.annotations import VideoList, read_video_list
from actionclip.labels import read_labels


def add(group: Any, data: str = "the data", *, several_splits: bool = False) -> None:
    """Add what helps to read a data set, or several splits of one."""
    group.add_argument("--videos", metavar="DIR", help="folder that the paths of a list start from")
    group.add_argument(
        "--labels",
        metavar="FILE",
        help="the classes: .txt with a label a line, or .csv with columns id,name "
        f"(default: those that {data} names)",
    )
    group.add_argument(
        "--split",
        metavar="S",
        nargs="+" if several_splits else None,
        help=f"part of {data}, such as train1 or val"
        + ("; of several, the mean is reported" if several_splits else ""),
    )


def read(args: argparse.Namespace, data: str) -> VideoList:
    """Read the data set that the options above describe."""
    class_names = None if args.labels is None else read_labels([args.labels])
    return read_video_list(data, videos=args.videos, class_names=class_names, split=args.split)
