"""Make a store of other stores, without images or backbone: stored in another way, or several in one."""
