"""Methods that survey sections 3.4 and 3.5 name first: without training images, the images are made."""
