"""Networks, one LightningModule and the data modules that configurations and recipes name."""

from lightning_prune.zoo.cifar10 import CIFAR10
from lightning_prune.zoo.cifar_resnet import CIFARResNet
from lightning_prune.zoo.classifier import Classifier
from lightning_prune.zoo.cnn import HanCNN, SmallCNN
from lightning_prune.zoo.datasets import ImageTensors, data_folder, stratified_split
from lightning_prune.zoo.digits import Digits
from lightning_prune.zoo.image_folder import ImageFolderData
from lightning_prune.zoo.mlp import MLP
from lightning_prune.zoo.mnist import MNIST
from lightning_prune.zoo.torchvision_network import torchvision_network
from lightning_prune.zoo.weights import load_weights

__all__ = [
    "CIFAR10",
    "MLP",
    "MNIST",
    "CIFARResNet",
    "Classifier",
    "Digits",
    "HanCNN",
    "ImageFolderData",
    "ImageTensors",
    "SmallCNN",
    "data_folder",
    "load_weights",
    "stratified_split",
    "torchvision_network",
]
