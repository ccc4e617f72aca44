// TensorRT plugins of the kernels without Python: one IPluginV3 per row of TABLE. plugin_library.py writes TABLE from
// nodes.py into plugin_table.h, with the PTX of every function. TensorRT loads the library (load_library) and can
// store it in a plan (plugins_to_serialize).
//
// Loading the library needs neither the CUDA runtime nor a GPU: the driver is opened when a plugin first runs. A plugin
// loads its module in the CUDA context of the enqueuing thread, once per execution context.
// Source: TensorRT, IPluginV3; CUDA driver API.
#include <NvInferRuntime.h>
#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

enum class Rule { rows, half_rows, heads };  // as RULES in nodes.py

struct Ptx {
    int capability;  // 86 is sm_86
    int cuda;        // 13000 is CUDA 13.0
    const char* text;
};

struct Parameter {
    const char* name;
    bool pointer;
    bool written;
    DataType type;  // of the elements of a pointer
};

struct Function {
    DataType type;  // of the first input
    int choice;     // value of the attribute that chooses between functions; 0 if there is none
    const char* symbol;
    std::vector<Parameter> parameters;
    std::vector<Ptx> ptx;  // in order of preference
};

struct Attribute {
    const char* name;
    PluginFieldType type;
    bool chooses;
};

struct Description {
    const char* name;
    Rule rule;
    unsigned threads;
    std::vector<const char*> grid;  // scalars whose product is the number of blocks
    std::vector<Attribute> attributes;
    std::vector<Function> functions;
};

#include "plugin_table.h"  // NAMESPACE, VERSION, TABLE

ILoggerFinder* logger_finder = nullptr;

void report(const std::string& message) noexcept {
    if (ILogger* logger = logger_finder ? logger_finder->findLogger() : nullptr) {
        logger->log(ILogger::Severity::kERROR, message.c_str());
    }
}

// Call a function that may throw from an interface that may not: returns 0, or -1 after a line in TensorRT's log.
template <typename Work>
int32_t guarded(const char* name, Work work) noexcept {
    try {
        work();
        return 0;
    } catch (const std::exception& error) {
        report(std::string(NAMESPACE) + "." + name + ": " + error.what());
        return -1;
    }
}

// The functions of the CUDA driver that a launch needs.
class Driver {
public:
    static const Driver& get() {
        static const Driver driver;
        return driver;
    }

    void check(CUresult status, const char* what) const {
        const char* name = "an unknown error";
        if (status == CUDA_SUCCESS) return;
        error_name(status, &name);
        throw std::runtime_error(std::string(what) + " returned " + std::to_string(status) + " " + name);
    }

    decltype(&cuModuleLoadData) load = nullptr;
    decltype(&cuModuleUnload) unload = nullptr;
    decltype(&cuModuleGetFunction) function = nullptr;
    decltype(&cuLaunchKernel) launch = nullptr;
    decltype(&cuDriverGetVersion) version = nullptr;
    decltype(&cuCtxGetDevice) device = nullptr;
    decltype(&cuDeviceGetAttribute) attribute = nullptr;

private:
    Driver() {
        library = dlopen("libcuda.so.1", RTLD_NOW);
        if (!library) throw std::runtime_error("there is no NVIDIA driver");
        find(load, "cuModuleLoadData");
        find(unload, "cuModuleUnload");
        find(function, "cuModuleGetFunction");
        find(launch, "cuLaunchKernel");
        find(version, "cuDriverGetVersion");
        find(device, "cuCtxGetDevice");
        find(attribute, "cuDeviceGetAttribute");
        find(error_name, "cuGetErrorName");
    }

    template <typename Pointer>
    void find(Pointer& pointer, const char* name) {
        pointer = reinterpret_cast<Pointer>(dlsym(library, name));
        if (!pointer) throw std::runtime_error(std::string("the NVIDIA driver has no ") + name);
    }

    void* library = nullptr;
    decltype(&cuGetErrorName) error_name = nullptr;
};

// A function of a PTX text on the device of the current context; unloaded with its last reference.
class Loaded {
public:
    explicit Loaded(const Function& made) : driver(Driver::get()) {
        CUdevice device;
        int major, minor, cuda;
        driver.check(driver.device(&device), "cuCtxGetDevice");
        driver.check(driver.attribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device), "cuDeviceGetAttribute");
        driver.check(driver.attribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device), "cuDeviceGetAttribute");
        driver.check(driver.version(&cuda), "cuDriverGetVersion");
        const int capability = 10 * major + minor;
        for (const Ptx& ptx : made.ptx) {
            if (ptx.capability > capability || ptx.cuda > cuda) continue;
            driver.check(driver.load(&module, ptx.text), "cuModuleLoadData");
            driver.check(driver.function(&function, module, made.symbol), "cuModuleGetFunction");
            return;
        }
        throw std::runtime_error("no PTX for sm_" + std::to_string(capability) + " and CUDA " + std::to_string(cuda / 1000));
    }
    ~Loaded() {
        if (module) driver.unload(module);  // fails after the context, and with it the module, was destroyed
    }
    Loaded(const Loaded&) = delete;
    Loaded& operator=(const Loaded&) = delete;

    const Driver& driver;
    CUfunction function = nullptr;

private:
    CUmodule module = nullptr;
};

using Scalars = std::map<std::string, int64_t>;
using Values = std::map<std::string, double>;  // of attributes

// The int32 arguments that depend on shapes, as in nodes.py; they follow from the first input.
Scalars scalars_of(Rule rule, const Dims& dims, const Values& values) {
    const int64_t last = dims.d[dims.nbDims - 1];
    if (rule == Rule::heads) {
        const int64_t heads = static_cast<int64_t>(values.at("num_heads") + 2 * values.at("num_kv_heads"));
        return {{"batch", dims.d[0]}, {"tokens", dims.d[1]}, {"first_position", 0}, {"head_dim", last / heads}, {"copy_values", 1}};
    }
    int64_t rows = 1;
    for (int axis = 0; axis < dims.nbDims - 1; ++axis) rows *= dims.d[axis];
    return {{"rows", rows}, {"width", rule == Rule::rows ? last : last / 2}};
}

using Shape = std::vector<int64_t>;
constexpr int64_t OPEN = -1;  // a dimension that is not known yet

bool differ(int64_t one, int64_t other) { return one != OPEN && other != OPEN && one != other; }

// Throw if the known dimensions of the inputs do not match; as launch_scalars in nodes.py.
void check_shapes(Rule rule, const std::vector<Shape>& shapes, const Values& values) {
    const Shape& first = shapes[0];
    if (first.size() < 2 || (rule == Rule::heads && first.size() != 3)) throw std::runtime_error("wrong number of axes");
    const int64_t last = first.back();
    const int64_t heads = rule == Rule::heads ? static_cast<int64_t>(values.at("num_heads") + 2 * values.at("num_kv_heads")) : 1;
    if (last != OPEN && rule != Rule::rows && last % (2 * heads) != 0) {
        throw std::runtime_error("rows of " + std::to_string(last) + " columns cannot be divided");
    }
    for (size_t i = 1; i < shapes.size(); ++i) {
        const Shape wanted = rule == Rule::heads ? Shape{first[1], last == OPEN ? OPEN : last / heads / 2}
                             : shapes[i].size() == 1 ? Shape{last}
                                                     : first;
        bool fits = wanted.size() == shapes[i].size();
        for (size_t axis = 0; fits && axis < wanted.size(); ++axis) fits = !differ(wanted[axis], shapes[i][axis]);
        if (!fits) throw std::runtime_error("input " + std::to_string(i) + " has another shape than the first one asks for");
    }
}

std::vector<Shape> shapes_of(const PluginTensorDesc* tensors, int32_t count) {
    std::vector<Shape> shapes;
    for (int32_t i = 0; i < count; ++i) shapes.emplace_back(tensors[i].dims.d, tensors[i].dims.d + tensors[i].dims.nbDims);
    return shapes;
}

std::vector<Shape> shapes_of(const DimsExprs* tensors, int32_t count) {
    std::vector<Shape> shapes(count);
    for (int32_t i = 0; i < count; ++i) {
        for (int32_t axis = 0; axis < tensors[i].nbDims; ++axis) {
            const IDimensionExpr* dim = tensors[i].d[axis];
            shapes[i].push_back(dim->isConstant() ? dim->getConstantValue() : OPEN);
        }
    }
    return shapes;
}

int32_t bits_of(double value) {
    const float narrow = static_cast<float>(value);
    int32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    return bits;
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    Plugin(const Description& description, Values values) : node(description), values(std::move(values)) {
        int choice = 0;
        for (const Attribute& attribute : node.attributes) {
            if (attribute.chooses) choice = static_cast<int>(this->values.at(attribute.name));
        }
        for (const Function& function : node.functions) {
            if (function.choice == choice) functions.push_back(&function);
        }
        if (functions.empty()) throw std::runtime_error("no function for these attributes");
        for (const Parameter& parameter : functions[0]->parameters) {
            if (parameter.pointer) (parameter.written ? num_outputs : num_inputs) += 1;
        }
    }

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override {
        IPluginV3* copy = nullptr;
        guarded(node.name, [&] { copy = new Plugin(node, values); });
        return copy;
    }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    const char* getPluginName() const noexcept override { return node.name; }
    const char* getPluginVersion() const noexcept override { return VERSION; }
    const char* getPluginNamespace() const noexcept override { return NAMESPACE; }

    int32_t getNbOutputs() const noexcept override { return num_outputs; }

    int32_t getOutputDataTypes(DataType* outputs, int32_t count, const DataType* inputs, int32_t given) const noexcept override {
        return guarded(node.name, [&] {
            const Function* function = of(inputs[0]);
            if (!function || count != num_outputs || given != num_inputs) throw std::runtime_error("no kernel takes these inputs");
            for (int i = 0; i < given; ++i) {
                if (inputs[i] != array(*function, i).type) {
                    throw std::runtime_error(std::string(array(*function, i).name) + " is of another type than the kernel takes");
                }
            }
            for (int i = 0; i < count; ++i) outputs[i] = array(*function, num_inputs + i).type;
        });
    }

    int32_t getOutputShapes(const DimsExprs* inputs, int32_t given, const DimsExprs*, int32_t, DimsExprs* outputs, int32_t count,
                            IExprBuilder& builder) noexcept override {
        return guarded(node.name, [&] {
            const DimsExprs& first = inputs[0];
            check_shapes(node.rule, shapes_of(inputs, given), values);
            const IDimensionExpr* last = first.d[first.nbDims - 1];
            const auto divided = [&](int64_t by) {
                return builder.operation(DimensionOperation::kFLOOR_DIV, *last, *builder.constant(by));
            };
            for (int i = 0; i < count; ++i) {
                outputs[i] = first;
                if (node.rule == Rule::half_rows) outputs[i].d[first.nbDims - 1] = divided(2);
                if (node.rule != Rule::heads) continue;
                const int64_t heads = value("num_heads"), kv_heads = value("num_kv_heads");
                outputs[i].nbDims = 4;
                outputs[i].d[1] = builder.constant(i == 0 ? heads : kv_heads);
                outputs[i].d[2] = first.d[1];
                outputs[i].d[3] = divided(heads + 2 * kv_heads);
            }
        });
    }

    bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t, int32_t) noexcept override {
        const Function* function = of(tensors[0].desc.type);
        const PluginTensorDesc& tensor = tensors[position].desc;
        return function && tensor.format == TensorFormat::kLINEAR && tensor.type == array(*function, position).type;
    }

    int32_t configurePlugin(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*, int32_t) noexcept override {
        return 0;
    }
    int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t given, const PluginTensorDesc*, int32_t) noexcept override {
        return guarded(node.name, [&] { check_shapes(node.rule, shapes_of(inputs, given), values); });
    }

    int32_t enqueue(const PluginTensorDesc* inputs, const PluginTensorDesc*, const void* const* sources, void* const* targets,
                    void*, cudaStream_t stream) noexcept override {
        return guarded(node.name, [&] {
            const Function* function = of(inputs[0].type);
            if (!function) throw std::runtime_error("no kernel takes inputs of this type");
            check_shapes(node.rule, shapes_of(inputs, num_inputs), values);
            Scalars scalars = scalars_of(node.rule, inputs[0].dims, values);
            for (const Attribute& attribute : node.attributes) {
                if (attribute.type == PluginFieldType::kFLOAT32) {
                    scalars[std::string(attribute.name) + "_bits"] = bits_of(values.at(attribute.name));
                } else {
                    scalars[attribute.name] = value(attribute.name);
                }
            }
            int64_t blocks = 1;
            for (const char* name : node.grid) blocks *= scalars.at(name);
            if (blocks == 0) return;
            if (blocks > INT32_MAX) throw std::runtime_error("more rows than one launch can take");
            std::vector<const void*> pointers;
            std::vector<int32_t> numbers;
            pointers.reserve(function->parameters.size());  // elements must not move: the launch takes their addresses
            numbers.reserve(function->parameters.size());
            std::vector<void*> arguments;
            for (const Parameter& parameter : function->parameters) {
                if (parameter.pointer) {
                    pointers.push_back(parameter.written ? *targets++ : *sources++);
                    arguments.push_back(&pointers.back());
                } else {
                    numbers.push_back(static_cast<int32_t>(scalars.at(parameter.name)));
                    arguments.push_back(&numbers.back());
                }
            }
            if (!loaded) loaded = std::make_unique<Loaded>(*function);
            const Driver& driver = loaded->driver;
            driver.check(driver.launch(loaded->function, static_cast<unsigned>(blocks), 1, 1, node.threads, 1, 1, 0,
                                       reinterpret_cast<CUstream>(stream), arguments.data(), nullptr),
                         "cuLaunchKernel");
        });
    }

    const PluginFieldCollection* getFieldsToSerialize() noexcept override {
        const int32_t done = guarded(node.name, [&] {
            fields.clear();
            stored.assign(node.attributes.size(), 0);
            for (size_t i = 0; i < node.attributes.size(); ++i) {
                const Attribute& attribute = node.attributes[i];
                stored[i] = attribute.type == PluginFieldType::kFLOAT32 ? bits_of(values.at(attribute.name)) : value(attribute.name);
                fields.emplace_back(attribute.name, &stored[i], attribute.type, 1);
            }
            collection = {static_cast<int32_t>(fields.size()), fields.data()};
        });
        return done == 0 ? &collection : nullptr;
    }

private:
    const Function* of(DataType type) const noexcept {
        for (const Function* function : functions) {
            if (function->type == type) return function;
        }
        return nullptr;
    }
    const Parameter& array(const Function& function, int index) const noexcept {
        const Parameter* parameter = function.parameters.data();
        for (;; ++parameter) {
            if (parameter->pointer && index-- == 0) return *parameter;  // inputs come before outputs
        }
    }
    int32_t value(const char* name) const { return static_cast<int32_t>(values.at(name)); }

    const Description& node;
    const Values values;
    std::vector<const Function*> functions;  // one for each type of the first input
    int32_t num_inputs = 0, num_outputs = 0;
    std::unique_ptr<Loaded> loaded;  // a network is strongly typed: a plugin sees one type
    std::vector<int32_t> stored;     // every attribute, four bytes each
    std::vector<PluginField> fields;
    PluginFieldCollection collection{};
};

class Creator final : public IPluginCreatorV3One {
public:
    explicit Creator(const Description& description) : node(description) {
        for (const Attribute& attribute : node.attributes) fields.emplace_back(attribute.name, nullptr, attribute.type, 1);
        collection = {static_cast<int32_t>(fields.size()), fields.data()};
    }

    IPluginV3* createPlugin(const char*, const PluginFieldCollection* given, TensorRTPhase) noexcept override {
        IPluginV3* plugin = nullptr;
        guarded(node.name, [&] {
            Values values;
            for (const Attribute& attribute : node.attributes) values[attribute.name] = read(attribute, *given);
            plugin = new Plugin(node, std::move(values));
        });
        return plugin;
    }
    const PluginFieldCollection* getFieldNames() noexcept override { return &collection; }
    const char* getPluginName() const noexcept override { return node.name; }
    const char* getPluginVersion() const noexcept override { return VERSION; }
    const char* getPluginNamespace() const noexcept override { return NAMESPACE; }

private:
    static double read(const Attribute& attribute, const PluginFieldCollection& given) {
        for (int32_t i = 0; i < given.nbFields; ++i) {
            const PluginField& field = given.fields[i];
            if (std::strcmp(field.name, attribute.name) != 0 || field.type != attribute.type || !field.data) continue;
            if (attribute.type == PluginFieldType::kFLOAT32) return *static_cast<const float*>(field.data);
            return *static_cast<const int32_t*>(field.data);
        }
        throw std::runtime_error(std::string("no attribute ") + attribute.name);
    }

    const Description& node;
    std::vector<PluginField> fields;
    PluginFieldCollection collection{};
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(ILoggerFinder* finder) { logger_finder = finder; }

extern "C" __attribute__((visibility("default"))) IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static std::vector<std::unique_ptr<Creator>> made;
    static std::vector<IPluginCreatorInterface*> creators;
    static std::once_flag once;
    std::call_once(once, [] {
        for (const Description& description : TABLE) {
            made.push_back(std::make_unique<Creator>(description));
            creators.push_back(made.back().get());
        }
    });
    count = static_cast<int32_t>(creators.size());
    return creators.data();
}
