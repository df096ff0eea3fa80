"""Robustness of a network: common corruptions and attacks of pictures, and the errors that they cause."""

from .attacks import Attack as Attack
from .attacks import fgsm as fgsm
from .attacks import pgd as pgd
from .attacks import read_attack as read_attack
from .corruption_error import ALEXNET as ALEXNET
from .corruption_error import CorruptionErrors as CorruptionErrors
from .corruption_error import corruption_error as corruption_error
from .corruptions import KINDS as KINDS
from .corruptions import corrupt as corrupt
