// What this instruction set has, as kernels.h describes it.

template <class T>
constexpr StorageKernels<T> kStorage = {
    pack<T, acc_t<T>>,
    pack_micropanels<T>,
    skinny<T>,
    skinny_many<T>,
    epilogue<T>,
    act_backward<T>,
    sum<T>,
    subtract<T>,
    center_runs<T>,
    column_sums<T>,
    subtract_columns<T>,
    center_columns<T>,
    layer_norm<T>,
    layer_norm_backward<T>};

template <class T>
constexpr UpdateKernels<T> kUpdates = {sgd<T>,     adam_moments<T>, adam<T>,   rmsprop_moments<T>,
                                       rmsprop<T>, adagrad_sum<T>,  adagrad<T>};

constexpr Kernels kTable = {
    MYLAYERS_STRING(MYLAYERS_ISA),
    {kMr, kNrVectors * kLanes<float>, macrokernel<float>, skinny_transposed<float>},
    {kMr, kNrVectors * kLanes<double>, macrokernel<double>, skinny_transposed<double>},
    kStorage<float>,
    kStorage<double>,
    kStorage<half_t>,
    kStorage<bfloat16_t>,
    kVnni,
    kAmx,
    kUpdates<float>,
    kUpdates<double>,
};
