// One plain struct per op: pointers, sizes, strides, dtype. All that kernels see: no torch here.
//
// Letters: T tokens, E experts, K experts per token, N = T*K rows, D width, F hidden, C classes,
// M modules, E1 = E+1. Strides count elements; the last dimension is contiguous unless a stride is
// given for it. Outputs are contiguous.
#pragma once

#include <cstdint>

namespace gose {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64, kInt32 };

struct CombineParams {  // out[t, d] = sum_k weight[t, k] * y[row[t, k], d], k ascending
  const void* y;        // [N, D] dtype
  const float* weight;  // [T, K]
  const int32_t* row;   // [T, K] in [0, N), -1 = unused
  void* out;            // [T, D] dtype, written once
  int64_t T, D, K, stride_yn;
  DType dtype;
};

struct CombineBackwardParams {  // grad_y[row[t,k]] = weight[t,k] * grad[t], grad_weight = grad . y
  const void* grad;             // [T, D] dtype
  const void* y;                // [N, D] dtype
  const float* weight;          // [T, K]
  const int32_t* row;           // [T, K], every row of y in one slot at most
  void* grad_y;                 // [N, D] dtype, zeroed by the caller: unused rows stay 0
  float* grad_weight;           // [T, K], 0 in unused slots
  int64_t T, D, K, stride_gt, stride_yn;
  DType dtype;
};

struct EntropyParams {  // out[row] = -sum_c p log p / log n, p = softmax of the row
  const void* logits;   // [rows, C] dtype, contiguous; -infinity = class not offered
  float* out;           // [rows]
  int64_t rows, C;
  DType dtype;
};

struct EntropyBackwardParams {  // grad_logits = grad * -p (z - sum p z) / log n
  const float* grad;            // [rows]
  const void* logits;           // [rows, C] dtype
  void* grad_logits;            // [rows, C] dtype
  int64_t rows, C;
  DType dtype;
};

struct DispatchParams {   // rows of expert e are [offset[e], offset[e+1]), in order of t, then k
  const int32_t* expert;  // [T, K] in [0, E], E = unused
  int32_t* row;           // [T, K], -1 = unused
  int32_t* token;         // [T*K], -1 from offset[E] on
  int32_t* offset;        // [E1]
  int32_t* scratch;       // [ceil(T*K / chunk), E1]
  int64_t T, K, E, chunk;
};

constexpr int64_t kRouteBlock = 64;                  // tokens whose statistics are summed together
constexpr int64_t kRouteRows = 8, kRouteCounts = 3;  // rows of a block's scratch

struct RouteScratch {  // max(1, ceil(T / kRouteBlock)) blocks, E padded to a multiple of 16
  float* floats;       // [blocks, kRouteRows, E padded]
  int32_t* ints;       // [blocks, kRouteCounts, E padded], zeroed
  double* doubles;     // [blocks, 3]
  float* column;       // [2, E padded]
  float* log_p;        // expert_choice: [T, E padded]; priority: [T]; else nullptr
  uint32_t* order;     // expert_choice: [E padded, T]; priority: [4, T]; else nullptr
};

enum class RoutePolicy : int32_t { kSoftmax, kSigmoid, kGroupLimited, kExpertChoice, kEgs };
enum class RouteSum : int32_t { kNothing, kExperts, kChosen };  // what weights are normalized over
enum class RouteAdaptive : int32_t { kNone, kMass, kBands };

struct RouteInput {      // the contract is in gose_kernels/ops/route.py
  const void* score;     // [T, E] dtype
  const float* entropy;  // [T or 1, E], policy egs only
  const float* bias;     // [E] or nullptr
  const float* noise;    // [T, E] or nullptr
  const double* bands;   // [num_bands], ascending
  int64_t T, E, K, stride_st, stride_et, stride_nt;
  int64_t num_groups, top_groups, num_bands;
  int64_t capacity;  // 0 = none
  float floor, tau;  // egs weights 1 / (H + floor), or softmax(-H / tau) if tau > 0
  float mass, noise_std;
  RoutePolicy policy;
  RouteSum sum;
  RouteAdaptive adaptive;
  bool sigmoid;   // a = log sigmoid(score), not score
  bool priority;  // capacity goes to the surest tokens first, else to the first ones
  DType dtype;
};

struct RouteParams {
  RouteInput in;
  float* weight;      // [T, K]
  int32_t* expert;    // [T, K], E = unused
  float* entropy;     // [T]
  int32_t* load;      // [E]
  float* importance;  // [E]
  float* loss;        // [5]
  RouteScratch scratch;
};

// route on a GPU. Blocks of `tokens` tokens sum on their own; every array of `blocks` is theirs.
constexpr int64_t kRouteDeviceExperts = 1024;  // rows of a token fit in shared memory
constexpr int64_t kRouteBands = 16;
constexpr int64_t kRouteMostTokens = 8192;  // of a block: twice as many fit in 16 bits

enum class RoutePass : int32_t { kAll, kCount, kChoose };  // kCount, kChoose: of expert_choice

struct RouteDeviceParams {
  RouteInput in;      // bands unused
  float* weight;      // [T, K]
  int32_t* expert;    // [T, K], E = unused
  float* entropy;     // [T]
  int32_t* load;      // [E]
  float* importance;  // [E]
  float* loss;        // [5]
  float* log_p;       // [E, T]: expert_choice; -infinity where the expert does not take the token
  int16_t* level;     // [E, T] 1 + slot of the token that is the expert's, or 0: capacity
  float* first;       // [T] log p of the first slot: capacity by priority
  float* part_importance;  // [blocks, E]
  float* win;              // [blocks, E], or nullptr: noise_std = 0
  int16_t* part_count;     // [blocks, E] twice the slots, plus 1 if available to a token
  float* part_sums;        // [blocks, 3] tokens, z, entropy
  int64_t tokens;
  int64_t rank_bits;  // of the largest rank of a token with an expert
  RoutePass pass;
  float band[16];
};

struct RouteBackwardParams {
  RouteInput in;
  const int32_t* expert;         // [T, K], load and importance: outputs of route
  const int32_t* load;           // [E]
  const float* importance;       // [E]
  const float* grad_weight;      // [T, K]; a gradient that is nullptr is zero
  const float* grad_entropy;     // [T]
  const float* grad_importance;  // [E]
  const float* grad_loss;        // [5]
  void* grad;                    // of score [T, E] dtype, or of entropy [T or 1, E] float32
  RouteScratch scratch;
};

// route_backward on a GPU: arrays of `blocks` as above; a warp looks at `live_tokens` tokens.
struct RouteBackwardDeviceParams {
  RouteInput in;  // bands unused
  const int32_t* expert;
  const int32_t* load;
  const float* importance;
  const float* grad_weight;
  const float* grad_entropy;
  const float* grad_importance;
  const float* grad_loss;
  void* grad;          // [T, E] dtype; of entropy [T or 1, E] float32
  float* column;       // [E] gradient of importance, and the next three: nullptr without grad_loss
  float* scalar;       // [2] gradient of a token's logsumexp divided by it, and of its entropy
  uint8_t* part_live;  // [live blocks, E] 1 = available to a token; of experts without importance
  float* part_win;     // [blocks, E] sums of Phi(margin), and the next: nullptr if noise_std = 0
  float* win_slope;    // [E] gradient of the sum of Phi(margin), divided by noise_std
  float* part_grad;    // [blocks, E] sums of the gradient of an entropy per module
  int64_t tokens, live_tokens;
  bool again;  // drops hide a part of the choice that weights were normalized over
  float band[16];
};

constexpr int64_t kUpdateChunk = 4096;  // elements that one thread updates at a time: 64 to 128 KB

enum class MaskKind : int32_t { kNone, kBytes, kBits, kScores };

struct UpdateTensor {  // one entry of the lists; all tensors are contiguous
  void* param;         // [numel] dtype
  const void* grad;    // [numel] dtype
  float* master;       // the parameter in float32, laid out as a state; nullptr = there is none
  float* state[3];     // [numel] each, or [slots, inner] with `row`
  float* step;         // [num_steps]: per mask value with step_by_mask, else 1; may be nullptr
  const void* frozen;  // by kind, per unit of `inner` elements: a byte that is not 0, a bit (low
                       // first, inner = 1), or a score >= threshold: must not change
  const int32_t* row;  // [numel / inner] slot of a unit's state, -1 = none; nullptr = its own place
  int64_t numel, inner;  // elements; elements of a unit
  int64_t num_steps;
  int64_t end_chunk;    // chunks of this tensor and of those before it
  int64_t seed, start;  // of the draws: the seed, and element 0 in the whole tensor
  float threshold;
  MaskKind kind;
  bool step_by_mask;
};

struct UpdateScalars {  // numbers that stay on the device, for kernels there
  const void *lr = nullptr, *grad_scale = nullptr;  // float or double; grad_scale nullptr = 1
  double decay = 0;                                 // decoupled weight decay
  bool lr_is_double = false, grad_scale_is_double = false, maximize = false;
};

struct UpdateList {
  const UpdateTensor* tensor;  // [count]
  int64_t count, grain;        // grain: chunks that are worth a thread
  int64_t draw;                // step number of the draws
  DType dtype;                 // of param and grad: float32 or bfloat16
  bool stochastic;             // bfloat16 without master: rounded by draws, else to nearest
  UpdateScalars scalar = {};   // CUDA: in the place of lr, scale and keep below
};

struct MaskedSgdParams {  // the formulas are in gose_kernels/ops/masked_update.py
  UpdateList list;
  float lr, scale;  // scale: grad_scale or 1, negated for maximize
  float momentum, weight_decay;
  float undamped;  // 1 - dampening
  bool nesterov;
};

struct MaskedSquareSumParams {  // out[n] = sum of squares of the live elements of grad n
  UpdateList list;              // grad and masks alone
  double* partial;              // [chunks] of kUpdateChunk elements: scratch
  double* out;                  // [count]
};

struct MaskedAdamParams {
  UpdateList list;
  double lr, beta1, beta2;
  float scale, eps;
  float weight_decay;  // into the gradient, 0 when decoupled
  float keep;          // 1 - lr * weight_decay when decoupled, else 1
  bool amsgrad;
};

struct MaskedLionParams {
  UpdateList list;
  float lr, scale, keep;
  float beta1, beta2, rest1, rest2;  // rest = 1 - beta, rounded once
};

// Live elements that one thread codes at a time: whole blocks and whole bytes of every format.
constexpr int64_t kCodeUnit = 4096;

struct LiveParams {       // start[u] = elements before the live element kCodeUnit * u
  const uint8_t* frozen;  // [P / inner], not 0 = not coded
  int64_t P, inner;
  int64_t* start;  // [ceil(P / kCodeUnit)], or nullptr: count only
  int64_t* num_live;
};

struct CodeBad {    // the first value of a unit that is not finite
  int64_t element;  // -1 = there is none
  float value;
};

struct CodeFormat {
  int32_t bits, block;
  bool half_scale;  // float16, else float32
  float max_scale;
};

struct QuantizeParams {            // the formulas are in gose_kernels/ops/quantize.py
  const void* x;                   // [P] dtype
  const float* residual;           // [P] or nullptr
  const uint8_t* frozen;           // [P / inner] or nullptr
  const int64_t* start;            // [units], of LiveParams; nullptr without frozen
  const int64_t* place = nullptr;  // [L] flat indices of the live elements: what GPUs take instead
  uint8_t* code;
  void* scale;
  float* left;   // [P], zeroed where frozen; nullptr without residual
  CodeBad* bad;  // [units]
  int64_t P, L, inner;
  int64_t seed, step;
  bool stochastic;
  CodeFormat format;
  DType dtype;
};

struct DequantizeParams {
  const uint8_t* code;
  const void* scale;
  const uint8_t* frozen;           // [P / inner] or nullptr
  const int64_t* start;            // [units]
  const int64_t* place = nullptr;  // [L] as in QuantizeParams, -1 = no element
  float* out;                      // [P], zeroed where frozen, or added to
  int64_t P, L, inner;
  float weight;
  bool add;
  CodeFormat format;
};

// What packed panels hold: weights as they are, or integers and scales (cpu/quantized.h).
enum class Weights : int32_t { kPlain, kInt8, kInt4 };

// Weights [E, columns, K] as panels of 32 columns (cpu/microgemm.h). What the last panel and the
// last steps of K have too much is zero.
struct PackParams {
  const void* w;  // [E, columns, K] dtype, any strides
  char* packed;   // of expert e from e * stride_packed bytes on
  int64_t E, columns, K, stride_we, stride_wc, stride_wk, stride_packed;
  // With a gate, a panel holds 16 units' gates, then the same units' ups: columns 2u and 2u + 1
  // (interleaved) or u and units + u of w.
  bool gated, interleaved;
  DType dtype;
};

struct QuantizeWeightsParams {  // packs as integers; the formulas are in gose_kernels/quantized.py
  PackParams pack;
  Weights weights;    // not kPlain
  char* scratch;      // [threads, 8 * kPanel * K padded]
  int64_t threads;    // of the host
  uint8_t* infinite;  // [E], zeroed: set to 1 where a weight of the expert is not finite
};

enum class Phi : int32_t { kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };

struct Bias {
  const void* data;  // [E, columns] dtype, or null
  int64_t stride_e, stride_c;
};

struct ExpertMlpParams {    // out[t] = sum_k weight[t, k] * down(act(up(x[t]))) of expert[t, k]
  const void* x = nullptr;  // [T, D] dtype
  const int32_t* row = nullptr;     // [T, K] in [0, N), -1 = unused
  const int32_t* token = nullptr;   // [N]
  const int32_t* offset = nullptr;  // [E1]
  const float* weight = nullptr;    // [T, K]
  const char* up;                   // packed panels of the up (and gate) weights of every expert
  const char* down;                 // null like `up`: then the weights are packed as they are used
  PackParams raw_up = {}, raw_down = {};  // where to find them; packed and stride_packed unused
  Bias bias_up, bias_down;
  void* out = nullptr;               // [T, D] dtype
  void* pre;                         // [N, H] dtype, or null: what a backward keeps
  char* scratch = nullptr;           // null: the kernel only says how much it needs
  int64_t* scratch_bytes = nullptr;  // written where scratch is null
  int64_t T = 0, K, E, D, F, stride_xt, stride_packed;
  int64_t threads, cache;  // of the host; bytes of a core's second-level cache
  bool gated, interleaved;
  Phi phi;
  float limit, alpha, shift;  // of ops/activations.py; limit is infinity where there is none
  DType dtype;
  Weights weights = Weights::kPlain;  // of the panels: quantized ones go with every dtype
};

// Weight gradients [E, M, C], dtype, contiguous: out[e] = left^T . right over the rows of expert e.
struct WeightGradParams {
  void* out = nullptr;  // null: not wanted
  int64_t M, C;
  bool add;  // to what is there; what would get 0 is not touched
};

struct ExpertMlpBackwardParams {
  const void* x;     // [T, D] dtype
  const void* grad;  // [T, D] dtype
  const void* pre;   // [N, H] dtype
  const int32_t *row, *token, *offset;
  const float* weight;          // [T, K]
  PackParams raw_up, raw_down;  // as [E, D, H] and [E, F, D]: what x and pre are multiplied with
  Bias bias_down;
  const uint8_t* frozen_e;   // [E], or null
  const uint8_t* frozen_ef;  // [E, F], or null
  void* grad_x;              // [T, D] dtype, or null
  float* grad_weight;        // [T, K], or null
  WeightGradParams grad_up, grad_down;
  void* grad_bias_up;    // [E, H] dtype, or null
  void* grad_bias_down;  // [E, D] dtype, or null
  char* scratch;         // as in ExpertMlpParams
  int64_t* scratch_bytes;
  int64_t T, K, E, D, F, stride_xt, stride_gt;
  int64_t threads, cache;
  bool gated, interleaved, transposed;  // transposed: gradients are [E, D, H] and [E, F, D]
  Phi phi;
  float limit, alpha, shift;
  DType dtype;
};

struct GroupedGemmParams {  // y[n] = x[n] . w[e]^T + bias[e] for the rows n of every group e
  const void* x;            // [N, D] dtype
  const int32_t* offset;    // [E1]
  const char* w;            // packed panels, or null and
  PackParams raw;           // as in ExpertMlpParams
  Bias bias;
  void* y;                  // [N, F] dtype_y; rows from offset[E] on are zeroed
  char* scratch = nullptr;  // as in ExpertMlpParams
  int64_t* scratch_bytes = nullptr;
  int64_t N, E, D, F, stride_xn, stride_packed;
  int64_t threads, cache;
  DType dtype;             // of x and bias
  DType dtype_w, dtype_y;  // dtype or float32
};

struct GroupedGemmBackwardParams {  // gradients of the weights and of the bias
  const void* grad;                 // [N, F] dtype
  const void* x;                    // [N, D] dtype
  const int32_t* offset;            // [E1]
  WeightGradParams grad_w;          // [E, F, D], or [E, D, F] (transposed)
  void* grad_bias;                  // [E, F] dtype, or null
  char* scratch;
  int64_t* scratch_bytes;
  int64_t N, E, D, F, stride_gn, stride_xn;
  int64_t threads, cache;
  bool transposed;
  DType dtype;
};

// Why the values of a sample of distill_loss cannot be used, in the order of the reference's
// checks.
enum class DistillBad : int32_t {
  kNothing,
  kLabel,
  kSoftLabel,
  kTaskWeight,
  kId,
  kSameId,
  kTail,
  kMemory
};

struct DistillParams {         // the formulas are in gose_kernels/ops/distill_loss.py
  const void* student;         // [B, C] dtype
  const void* teacher;         // [B, C] or [B, J] teacher_dtype
  const int64_t* label;        // [B], or nullptr with
  const void* soft;            // [B, C] soft_dtype
  const float* weight;         // [B] or nullptr
  const float* task_weight_B;  // [B] or nullptr
  const int64_t* id;           // [B, J] or nullptr
  const float* tail;           // [B]
  float* term;                 // [B]
  void* grad;                  // [B, C] dtype, of grad_scale * sum of term; nullptr: not wanted
  DistillBad* bad;             // [B]
  int64_t B, C, J, stride_sb, stride_tb, stride_lb;
  float task_weight, inverse_tau, smoothing;
  float kl_scale;  // tau^2 / r
  float grad_scale;
  DType dtype, teacher_dtype, soft_dtype;
};

struct DistillDeviceParams {
  DistillParams in;  // bad unused
  uint8_t* seen;     // [B, C] zeros; with in.id, else nullptr
  float* loss;       // [1] mean of the terms, or nullptr: not wanted
};

constexpr int64_t kPanelWidth = 48;  // columns by which a panel may be wider than its contents

struct SquaredGradParams {  // the formulas are in gose_kernels/ops/squared_grad.py
  const void* x;            // [N, D] dtype
  const void* grad;         // [N, F] dtype
  const int64_t* order;     // [rows] rows of x by expert, then sample; nullptr: as they are
  const uint8_t* last;      // [rows], 1 at a sample's last row; nullptr: every row is its own
  const int64_t* offset;    // [E + 1] in [0, rows]
  float* square;            // [E, F, D]
  float* square_bias;       // [E, F]
  float* panel_x;           // [rows, D + kPanelWidth], scratch
  float* panel_g;           // [rows, F + kPanelWidth], scratch
  int64_t rows, D, F, E, stride_xn, stride_gn;
  DType dtype;
};

struct LowRankParams {    // the formulas are in gose_kernels/ops/low_rank.py; y = x + residual
  const void* x;          // [M, N] dtype
  const float* residual;  // [M, N] or nullptr
  float* q;               // [padded R, padded N]: old q, then the new one; zeros in the padding
  double* image;          // [padded R, padded M], zeroed: y @ q, then its basis
  double* reflect;        // [R, padded M], zeroed: scratch
  double* beta;           // [R]: scratch
  float* p_RM;            // [padded R, padded M], zeroed: p by columns
  float* p_MR;
  float* q_NR;
  float* left;   // [M, N], nullptr without residual
  CodeBad* bad;  // [ceil(M / 4)]
  int64_t M, N, R;
  int64_t padded_M, padded_N, padded_R;  // to multiples of 16, 32 and 4
  int64_t stride_xm;
  DType dtype;
};

}  // namespace gose
