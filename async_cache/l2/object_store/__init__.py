"""Objects in a bucket: S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage. Needs the extra `objects`.

    location  what a URL says: the bucket, and how it is reached
    faults    what is told of an error, and what kind of fault it is
    requests  requests that end, and turns of the loop to copy what they bring
    objects   one object: read in ranges and verified, written whole
    holdings  how much the prefix holds, as far as is known
    backend   the backend

The service and its client are obstore's, which is Rust's `object_store`: connections, signatures, credentials,
retries, pages of listings and parts of uploads are its business.
"""
