"""The application: from a dataset of images to a store of features. Run from the checkout, never installed.

Packages in the order of the data; each may import those above it, none below. All may import ``pipeline.errors``, the
schemas, the kernels and the reader. Only ``run.ray`` and ``train.ray_train`` use Ray:

    io               checks of outputs, storage errors
    reporting        progress, the report
    images           which images, their bytes, their pixels
    features         pixels to C channels, to k components
    views            random views of an image, and what undoes them
    upsamplers       h × w to H × W
    store            features to codes, bytes, committed shards
    run              who does it, and when
    train            weights for upsamplers
    evaluate         what the features are worth
"""
