"""The commands `odenets` and `lightning`: training, and the use of trained networks."""

from .entry import main as main
from .entry import repair_torchvision as repair_torchvision
