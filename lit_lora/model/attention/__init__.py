"""How tokens attend: over packed documents, over a key/value cache, by the kernel of the device."""
