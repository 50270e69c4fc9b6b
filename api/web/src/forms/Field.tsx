// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// One field of a form, made from its parameter's description.
import { Autocomplete, Checkbox, PasswordInput, Select, Textarea, TextInput } from '@mantine/core';

import { isTrue, type Param } from '../api/schema';

export interface Choice {
  value: string;
  label: string;
}

export interface FieldProps {
  name: string;
  label: string;
  param: Param;
  value: string;
  onChange: (value: string) => void;
  onBlur?: () => void;
  error?: string | undefined;
  /** What exists to choose from, when that is known. */
  choices?: Choice[] | undefined;
  /** Words that are often given; any other text is taken too. */
  suggestions?: readonly string[] | undefined;
  needed?: boolean;
  secret?: boolean;
  lines?: number;
  autoFocus?: boolean;
}

export function Field({ name, label, param, value, onChange, onBlur, error, choices, suggestions, needed, secret, lines, autoFocus }: FieldProps) {
  const placeholder = param.default === undefined ? undefined : String(param.default);
  const common = {
    name,
    label,
    size: 'xs' as const,
    error,
    description: param.description,
    withAsterisk: needed ?? false,
    inputWrapperOrder: ['label', 'input', 'description', 'error'] as ('label' | 'input' | 'description' | 'error')[],
    autoComplete: 'off',
    'data-autofocus': autoFocus || undefined,
    ...(onBlur ? { onBlur } : {}),
  };
  if (param.type === 'boolean') {
    const fallback = isTrue(param.default);
    const checked = value === '' ? fallback : isTrue(value);
    return (
      <Checkbox name={name} size="xs" label={label} description={param.description} error={error} checked={checked} onChange={(event) => onChange(event.currentTarget.checked ? '1' : '0')} />
    );
  }
  const options = choices ?? param.enum?.map((word) => ({ value: word, label: word }));
  if (options) {
    // A value that is no longer among the choices stays visible.
    const data = value && !options.some((option) => option.value === value) ? [{ value, label: value }, ...options] : options;
    return (
      <Select
        {...common}
        data={data}
        value={value || null}
        onChange={(chosen) => onChange(chosen ?? '')}
        clearable={!needed}
        searchable={data.length > 8}
        placeholder={options.length ? placeholder : 'None on this node'}
        nothingFoundMessage="Nothing matches"
        clearButtonProps={{ 'aria-label': `Clear ${label}` }}
        allowDeselect={!needed}
      />
    );
  }
  if (suggestions) return <Autocomplete {...common} data={[...suggestions]} value={value} onChange={onChange} placeholder={placeholder} />;
  const change = (event: { currentTarget: { value: string } }) => onChange(event.currentTarget.value);
  if (secret) return <PasswordInput {...common} autoComplete="new-password" value={value} onChange={change} visibilityToggleButtonProps={{ 'aria-label': `Show ${label.toLowerCase()}` }} />;
  if (lines) return <Textarea {...common} autosize minRows={lines} maxRows={10} value={value} onChange={change} />;
  const numeric = param.type === 'integer' || param.type === 'number';
  return <TextInput {...common} inputMode={numeric ? 'numeric' : 'text'} value={value} onChange={change} placeholder={placeholder} />;
}
