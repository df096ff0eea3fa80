"""The commands `odenets` and `lightning`: training, and what is done with a trained network."""

from .entry import main as main
from .entry import repair_torchvision as repair_torchvision
