"""Networks described by a Darknet `.cfg`: parser, network, `.weights` files, and the way to and from native ones."""
