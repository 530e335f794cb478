"""Any backend, with objects encoded on their way into it: compressed, encrypted, or both.

    backend    `CodecBackend`: wraps a backend; threads encode and decode
    codec      one object: the steps in their order, and the checks of what comes back
    steps      what is done to the bytes of an object, one after the other
    header     the format of an encoded object's header
    names      what the objects of a codec are called in the store
    scratch    the memory for encoded objects, which is bounded
    zstd       lossless compression; needs `async-kv-cache[codecs]`
    aes        encryption; needs `async-kv-cache[codecs]`
    keyfile    the keys in a file
    parameters the parameters of a URL

`docs/backends/codecs.md` says what it promises.
"""
