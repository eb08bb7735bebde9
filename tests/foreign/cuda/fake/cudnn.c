/* cuDNN without a device: descriptors are blank memory, every plan is as good as the next, nothing is computed. */
#include <string.h>

#include "note.h"

static int blank(void **made)
{
    *made = calloc(1, 256);
    return 0;
}

size_t cudnnGetVersion(void) { return 92800; }
const char *cudnnGetErrorString(int error) { return "an error of the fake"; }
int cudnnGetStream(void *handle, void **stream) { return *stream = NULL, 0; }

int cudnnCreate(void **made)
{
    note(0, "cudnn_handle", 0, NULL);
    return blank(made);
}

/* The interface of operation graphs, which convolutions go by */

enum { TYPE_INT64 = 3, TYPE_DOUBLE = 4, TYPE_POINTER = 6, TYPE_DESCRIPTOR = 15 };

int cudnnBackendCreateDescriptor(int type, void **made) { return blank(made); }
int cudnnBackendDestroyDescriptor(void *descriptor) { return free(descriptor), 0; }
int cudnnBackendFinalize(void *descriptor) { return 0; }
int cudnnBackendInitialize(void *descriptor) { return 0; }
int cudnnBackendSetAttribute(void *descriptor, int name, int type, long count, const void *value) { return 0; }

int cudnnBackendGetAttribute(void *descriptor, int name, int type, long room, long *count, void *value)
{
    int wide = type == TYPE_INT64 || type == TYPE_DOUBLE || type == TYPE_POINTER;
    if (count)
        *count = 1;
    if (value && type != TYPE_DESCRIPTOR && room > 0)
        memset(value, 0, wide ? 8 : 4);
    return 0;
}

int cudnnBackendExecute(void *handle, void *plan, void *variables)
{
    note(0, "convolution", 0, NULL);
    return 0;
}

/* The older interface */

#define CREATES(what) int cudnnCreate##what##Descriptor(void **made) { return blank(made); }
#define DOES(what) int cudnn##what(void) { return 0; }

CREATES(Activation) CREATES(Convolution) CREATES(Dropout) CREATES(Filter) CREATES(LRN) CREATES(Pooling)
CREATES(ReduceTensor) CREATES(RNN) CREATES(RNNData) CREATES(Tensor)

int cudnnGetReductionWorkspaceSize(void *handle, void *kind, void *from, void *to, size_t *bytes)
{
    *bytes = 1024;
    return 0;
}

int cudnnGetReductionIndicesSize(void *handle, void *kind, void *from, void *to, size_t *bytes)
{
    *bytes = 0;
    return 0;
}

DOES(Destroy) DOES(SetStream) DOES(GetLastErrorString)
DOES(DestroyActivationDescriptor) DOES(DestroyConvolutionDescriptor) DOES(DestroyDropoutDescriptor)
DOES(DestroyFilterDescriptor) DOES(DestroyLRNDescriptor) DOES(DestroyPoolingDescriptor)
DOES(DestroyReduceTensorDescriptor) DOES(DestroyRNNDataDescriptor) DOES(DestroyRNNDescriptor)
DOES(DestroyTensorDescriptor)
DOES(SetActivationDescriptor) DOES(SetConvolutionGroupCount) DOES(SetConvolutionMathType)
DOES(SetConvolutionNdDescriptor) DOES(SetDropoutDescriptor) DOES(SetFilterNdDescriptor) DOES(SetLRNDescriptor)
DOES(SetPoolingNdDescriptor) DOES(SetReduceTensorDescriptor) DOES(SetRNNDataDescriptor) DOES(SetRNNDescriptor_v8)
DOES(SetTensorNdDescriptor) DOES(DeriveBNTensorDescriptor) DOES(GetTensorNdDescriptor)
DOES(ActivationForward) DOES(AddTensor) DOES(BatchNormalizationForwardInference)
DOES(BatchNormalizationForwardTraining) DOES(ConvolutionBiasActivationForward) DOES(ConvolutionForward)
DOES(DropoutGetStatesSize) DOES(FindConvolutionForwardAlgorithmEx) DOES(GetConvolutionForwardAlgorithm_v7)
DOES(GetConvolutionForwardWorkspaceSize) DOES(GetRNNTempSpaceSizes) DOES(GetRNNWeightParams)
DOES(LRNCrossChannelForward) DOES(PoolingForward) DOES(ReduceTensor) DOES(RNNForward) DOES(SoftmaxForward)
