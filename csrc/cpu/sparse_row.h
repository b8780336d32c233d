// A student row against K (id, weight) entries and a tail: the student's softmax over the whole row, and a gather.
// Included like vec.h.
//
// The entries' columns are taken out before the exponentials, so that the tail's log-sum-exp is exact however small its
// mass is; their own gradient is written from the row's statistics at the end.

template <typename T>
class SparseRow : RowSweep<T> {
  using Base = RowSweep<T>;
  using Base::s_, Base::t_, Base::one_, Base::task_;

 public:
  SparseRow(const RowTask& task, void* workspace)
      : Base(task, task.kd != 0, true, workspace), active_(task.kd != 0), entries_(task.entries) {
    // The teacher's side of the workspace is free: the tail's factors, and the entries in tile order.
    tail_factor_ = t_.factor;
    order_ = (int32_t*)t_.e;
    starts_ = (int32_t*)t_.offset;
  }

  RowResult run() {
    if (is_bad() || (active_ && !sort_entries())) return this->fail();
    for (int64_t k = 0; k < tile_count(this->columns()); ++k) sweep(k);
    this->finish_softmax();
    if (active_) include_entries();
    const double ce = this->finish_truth();
    RowResult result = this->total(active_ ? value() : 0, ce);
    if (result.loss != result.loss) return this->fail();
    if (task_.want_parts) describe(result);
    if (task_.grad) gradient();
    return result;
  }

 private:
  bool is_bad() const { return this->bad_label() || (active_ && !(task_.tau_s > 0 && 1 / task_.tau_s > 0)); }

  // Buckets the entries by tile; false where an id is out of the shared vocabulary.
  bool sort_entries() {
    const int64_t tiles = tile_count(this->columns());
    if (entries_.count > this->columns()) return false;
    for (int64_t k = 0; k <= tiles; ++k) starts_[k] = 0;
    for (int64_t i = 0; i < entries_.count; ++i) {
      if (entries_.id[i] < 0 || entries_.id[i] >= task_.shared) return false;
      ++starts_[entries_.id[i] / kTile];
    }
    for (int64_t k = 0, before = 0; k <= tiles; ++k) {
      const int32_t count = starts_[k];
      starts_[k] = int32_t(before);
      before += count;
    }
    for (int64_t i = 0; i < entries_.count; ++i) order_[starts_[entries_.id[i] / kTile]++] = int32_t(i);
    // Filling moved every start to its tile's end, which is the next tile's start.
    for (int64_t k = tiles; k > 0; --k) starts_[k] = starts_[k - 1];
    starts_[0] = 0;
    return true;
  }

  double logit(int64_t entry) const { return load_one(task_.student, entries_.id[entry]); }

  // ---- forward ----------------------------------------------------------------------------------------------------

  void sweep(int64_t k) {
    this->sweep_truth(k);
    if (this->at_one_ == AtOne::kUnused && !active_) return;
    const int count = this->tile_size(k), kept = Base::clamp_tile(s_.columns - k * kTile);
    SweepMode mode;
    mode.square = this->at_one_ == AtOne::kSquared;
    if (kept == count && !(active_ && starts_[k] < starts_[k + 1])) {
      this->with_student(k, [&](auto* x) { this->sweep_tile(k, s_, mode, count, x, x); });
    } else if (kept > 0) {
      // What sweep_tile() takes for a mask may only be entries.
      const bool masked = Base::holds_mask(this->student_tile(k), count);
      const T* x = without_entries(k, kept);
      this->sweep_tile(k, s_, mode, kept, x, x);
      this->masked_[k] = masked;
    }
    for (int i = kept; i < Base::padded(count); ++i) s_.e[k * kTile + i] = T(0);
  }

  const T* without_entries(int64_t k, int kept) {
    T* x = this->student_tile_to_change(k);
    for (int i = kept; i < Base::padded(this->tile_size(k)); ++i) x[i] = -Real<T>::kInf;
    if (active_)
      for (int32_t i = starts_[k]; i < starts_[k + 1]; ++i) x[entries_.id[order_[i]] - k * kTile] = -Real<T>::kInf;
    return x;
  }

  void include_entries() {
    tail_z_ = s_.z;
    tail_lse_ = s_.z == 0 ? -Real<double>::kInf : s_.lse();
    for (int64_t k = 0; k < tile_count(s_.columns); ++k) tail_factor_[k] = s_.factor[k];
    const bool squared = this->at_one_ == AtOne::kSquared;
    for (int64_t i = 0; i < entries_.count; ++i) {
      s_.include(logit(i));
      if (squared) one_.include(logit(i));
    }
    s_.normalize();
    if (squared) one_.normalize();
    lse_s_ = s_.lse();
  }

  double value() {
    dead_ = s_.z == 0;
    if (dead_) return 0;
    double total = 0;
    for (int64_t i = 0; i < entries_.count; ++i) {
      const double w = entries_.weight[i];
      if (w == 0) continue;
      mass_ += w;
      total += w * ((entries_.subtract_entropy ? ::log(w) : 0) - s_.log_probability(logit(i)));
    }
    if (entries_.tail == -Real<double>::kInf) return total;
    if (tail_z_ == 0) return Real<double>::kInf;
    tail_mass_ = ::exp(entries_.tail);
    mass_ += tail_mass_;
    return total + tail_mass_ * ((entries_.subtract_entropy ? entries_.tail : 0) - (tail_lse_ - lse_s_));
  }

  // ---- gradient ---------------------------------------------------------------------------------------------------

  void gradient() {
    const bool kd = active_ && !dead_;
    const double slope = task_.kd * s_.scale();
    for (int64_t k = 0; k < tile_count(this->columns()); ++k) {
      typename Base::Slopes slopes;
      const bool shared = kd && k < tile_count(s_.columns);
      if (shared) slopes.student = slope * (mass_ * s_.factor[k] - (tail_z_ != 0 ? tail_mass_ * tail_factor_[k] : 0));
      if (shared && starts_[k] < starts_[k + 1]) {
        slopes.h_tile = entry_tile(k, slope);
        slopes.h = 1;
      }
      this->write_gradient(k, slopes);
    }
  }

  // A tile with nothing but the entries' gradient: their exponentials were taken out.
  const T* entry_tile(int64_t k, double slope) {
    T* g = this->tile_t_;
    for (int i = 0; i < kTile; ++i) g[i] = T(0);
    // Where the exponentials also serve temperature 1, the entries are missing there too.
    const bool truth = this->at_one_ == AtOne::kShared || this->at_one_ == AtOne::kSquared;
    for (int32_t i = starts_[k]; i < starts_[k + 1]; ++i) {
      const int32_t entry = order_[i];
      const double x = logit(entry);
      double value = slope * (mass_ * ::exp(s_.log_probability(x)) - entries_.weight[entry]);
      if (truth) value += this->truth_slope() * ::exp(this->at_one().log_probability(x));
      g[entries_.id[entry] - k * kTile] += T(value);
    }
    return g;
  }

  void describe(RowResult& result) {
    if (!active_ || dead_) return;
    result.entropy = this->entropy();
    double best = -1;
    int64_t id = -1;
    for (int64_t i = 0; i < entries_.count; ++i) {
      const double log_q = s_.log_probability(logit(i)), q = ::exp(log_q);
      if (q > 0) result.entropy -= q * log_q;
      if (entries_.weight[i] > best) {
        best = entries_.weight[i];
        id = entries_.id[i];
      }
    }
    result.top1 = this->argmax(task_.student) == id;
  }

  const bool active_;
  const Entries& entries_;
  double* tail_factor_;
  int32_t *order_, *starts_;
  bool dead_ = false;
  double tail_z_ = 0, tail_lse_ = 0, lse_s_ = 0, mass_ = 0, tail_mass_ = 0;
};
