"""Channel statistics of the CIFAR-10 training images scaled to [0, 1]: red, green, blue."""

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
