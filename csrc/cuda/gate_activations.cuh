// Activations of gates and GLUs and their slopes, V elements at a time in float. The numbers are
// those of mmfast/reference/activations.py; a switch is taken once for V elements, by all threads
// alike.
#pragma once
#include "device.cuh"

namespace mmfast {

// 0 and 1 at the infinities, NaN stays NaN.
MMFAST_DEVICE float gate_sigmoid(float x) { return rcp_approx(1.0f + device_expf(-x)); }

// ---- gates: 0 tanh, 1 sigmoid, 2 identity -------------------------------------------------------

template <int V>
MMFAST_DEVICE void activate_gate(float (&x)[V], int activation) {
  if (activation == 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = device_tanhf(x[i]);
  } else if (activation == 1) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = gate_sigmoid(x[i]);
  }
}

// x becomes act(x); slope is act'(x).
template <int V>
MMFAST_DEVICE void activate_gate(float (&x)[V], float (&slope)[V], int activation) {
  if (activation == 2) {
#pragma unroll
    for (int i = 0; i < V; ++i) slope[i] = 1.0f;
  } else if (activation == 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[i] = device_tanhf(x[i]);
      slope[i] = 1.0f - x[i] * x[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[i] = gate_sigmoid(x[i]);
      slope[i] = x[i] * (1.0f - x[i]);
    }
  }
}

// ---- GLUs: 0 silu, 1 gelu (erf), 2 gelu_tanh, 3 relu, 4 sigmoid, 5 identity ---------------------

constexpr float kGeluScale = 1.59576912160573f;    // 2 sqrt(2 / pi)
constexpr float kGeluCubic = 0.0713548162726009f;  // 0.044715 of it

MMFAST_DEVICE float normal_cdf(float x) {
  return 0.5f * (1.0f + device_erff(x * 0.70710678118654752f));
}

// x sigmoid(2u) = x (1 + tanh u) / 2, which does not cancel for negative x.
MMFAST_DEVICE float gelu_sigmoid(float x) {
  return gate_sigmoid(x * (kGeluScale + kGeluCubic * x * x));
}

template <int V>
MMFAST_DEVICE void activate_glu(float (&x)[V], int activation) {
  if (activation == 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] *= gate_sigmoid(x[i]);
  } else if (activation == 1) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] *= normal_cdf(x[i]);
  } else if (activation == 2) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] *= gelu_sigmoid(x[i]);
  } else if (activation == 3) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = x[i] <= 0.0f ? 0.0f : x[i];  // NaN stays NaN
  } else if (activation == 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = gate_sigmoid(x[i]);
  }
}

template <int V>
MMFAST_DEVICE void activate_glu(float (&x)[V], float (&slope)[V], int activation) {
  if (activation == 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float s = gate_sigmoid(x[i]);
      x[i] *= s;
      slope[i] = s + x[i] * (1.0f - s);
    }
  } else if (activation == 1) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float cdf = normal_cdf(x[i]);
      slope[i] = cdf + x[i] * 0.39894228040143268f * device_expf(-0.5f * x[i] * x[i]);
      x[i] *= cdf;
    }
  } else if (activation == 2) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float s = gelu_sigmoid(x[i]), inner = kGeluScale + 3.0f * kGeluCubic * x[i] * x[i];
      x[i] *= s;
      slope[i] = s + x[i] * (1.0f - s) * inner;
    }
  } else if (activation == 3) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      slope[i] = x[i] <= 0.0f ? 0.0f : 1.0f;
      x[i] = x[i] <= 0.0f ? 0.0f : x[i];
    }
  } else if (activation == 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[i] = gate_sigmoid(x[i]);
      slope[i] = x[i] * (1.0f - x[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) slope[i] = 1.0f;
  }
}

}  // namespace mmfast
