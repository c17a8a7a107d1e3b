"""Full-precision spiking architectures, one file each; sizes are functions. They know nothing of bits."""
