"""The application: from a dataset of images to a store of features. Run from the checkout, never installed.

Rooms in the order of the data; each imports those above it in this list, and none below:

    io, reporting    places that are written to; what a job says
    images           which images, their bytes, their pixels
    features         pixels to C channels, to k components
    views            random views of an image, and what undoes them
    upsamplers       h × w to H × W
    store            features to codes, bytes, committed shards
    run              who does it, and when
    train            weights for upsamplers
"""
