// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Creates a guest step by step. Any step can be gone to at any time; the last one shows what will be sent.
import { Button, Checkbox, Group, Modal, Skeleton, Stack, Stepper, Table, Text } from '@mantine/core';
import { useEffect, useRef, useState, type FormEvent } from 'react';

import type { Params } from '../api/schema';
import { ErrorNote } from '../app/ErrorPage';
import type { Source } from '../forms/choices';
import { Field, type Choice } from '../forms/Field';
import { labelOf } from '../forms/labels';
import { fieldParam, type Values } from '../forms/values';
import { findErrors, parametersOf, useCreate, useWizardState, visible } from './state';
import { WIZARDS, type StepSpec, type WizardSpec } from './steps';

interface WizardProps {
  kind: 'vm' | 'ct';
  node: string | undefined;
  onClose: () => void;
}

interface StepFieldsProps {
  step: StepSpec;
  params: Params;
  values: Values;
  errors: Record<string, string>;
  choices: Map<Source, Choice[]>;
  onChange: (name: string, value: string) => void;
}

function StepFields({ step, params, values, errors, choices, onChange }: StepFieldsProps) {
  const box = useRef<HTMLDivElement>(null);
  useEffect(() => box.current?.querySelector<HTMLElement>('input, textarea')?.focus(), []);
  return (
    <div ref={box} className="atoll-fields">
      {visible(step, values).map((field) => (
        <Field
          key={field.name}
          name={field.name}
          label={field.label}
          param={field.own ? { type: 'string', enum: [...field.own] } : field.name === 'node' ? { type: 'string' } : (fieldParam(params, field.name) ?? { type: 'string' })}
          value={values[field.name] ?? ''}
          onChange={(value) => onChange(field.name, value)}
          error={errors[field.name]}
          choices={field.source ? (choices.get(field.source) ?? []) : undefined}
          suggestions={field.suggestions}
          needed={field.needed ?? false}
          secret={field.secret ?? false}
          lines={field.lines ?? 0}
        />
      ))}
    </div>
  );
}

function Review({ parameters, node }: { parameters: Record<string, string>; node: string | null }) {
  const rows = Object.entries({ node: node ?? '', ...parameters });
  return (
    <Table withTableBorder fz="sm" verticalSpacing={3}>
      <Table.Tbody>
        {rows.map(([name, value]) => (
          <Table.Tr key={name}>
            <Table.Th w={200} scope="row" title={name}>
              {labelOf(name)}
            </Table.Th>
            <Table.Td className="atoll-value">{name === 'password' ? '••••••••' : value}</Table.Td>
          </Table.Tr>
        ))}
      </Table.Tbody>
    </Table>
  );
}

function Steps({ spec, startNode, onClose }: { spec: WizardSpec; startNode: string | undefined; onClose: () => void }) {
  const { params, steps, choices, values, setValues, node, error } = useWizardState(spec, startNode);
  const [at, setAt] = useState(0);
  const [start, setStart] = useState(true);
  /** Steps that were left: what is wrong in them is shown. */
  const [seen, setSeen] = useState<ReadonlySet<number>>(new Set());
  const create = useCreate(node, spec.type);
  if (error) return <ErrorNote error={error} title="The wizard cannot be offered" />;
  if (!params) return <Skeleton h={260} />;

  const { wrong, refused } = findErrors(steps, params, values, create.error);
  const last = steps.length;
  const blocked = Object.keys(wrong).length > 0;
  const parameters = parametersOf(spec, params, values, start);
  const isBad = (index: number) => visible(steps[index], values).some((field) => (seen.has(index) && wrong[field.name]) || refused[field.name]);
  const go = (index: number) => {
    setSeen(new Set([...seen, at, ...Array.from({ length: index }, (_, step) => step)]));
    setAt(index);
  };
  const submit = (event: FormEvent) => {
    event.preventDefault();
    if (at === last) {
      if (!blocked) create.mutate(parameters);
    } else if (visible(steps[at], values).some((field) => wrong[field.name])) setSeen(new Set([...seen, at]));
    else go(at + 1);
  };
  const step = steps[at];
  return (
    <form noValidate onSubmit={submit}>
      <Stepper active={at} onStepClick={go} size="xs" iconSize={22} wrap={false} mb="lg">
        {steps.map(({ title }, index) => (
          <Stepper.Step key={title} label={title} {...(isBad(index) ? { color: 'red' } : {})} />
        ))}
        <Stepper.Step label="Confirm" />
      </Stepper>
      <Stack gap="sm" mih={260}>
        {step ? (
          <StepFields
            key={at}
            step={step}
            params={params}
            values={{ ...values, node: node ?? '' }}
            errors={{ ...refused, ...(seen.has(at) ? wrong : {}) }}
            choices={choices}
            onChange={(name, value) => setValues((old) => ({ ...old, [name]: value }))}
          />
        ) : (
          <>
            <Review parameters={parameters} node={node} />
            {blocked && <Text size="sm" className="atoll-bad">Some steps still need a value; they are marked red.</Text>}
            <Checkbox size="xs" label="Start it when it is created" checked={start} onChange={(event) => setStart(event.currentTarget.checked)} />
            <ErrorNote error={create.error} title="It was not created" />
          </>
        )}
      </Stack>
      <Group justify="space-between" mt="md">
        <Button variant="default" onClick={onClose}>
          Cancel
        </Button>
        <Group gap="xs">
          <Button variant="default" disabled={at === 0} onClick={() => go(at - 1)}>
            Back
          </Button>
          <Button type="submit" disabled={at === last && blocked} loading={create.isPending}>
            {at < last ? 'Next' : 'Create'}
          </Button>
        </Group>
      </Group>
    </form>
  );
}

export function Wizard({ kind, node, onClose }: WizardProps) {
  const spec = WIZARDS[kind];
  return (
    <Modal opened onClose={onClose} title={spec.title} size={880} closeOnClickOutside={false}>
      <Steps spec={spec} startNode={node} onClose={onClose} />
    </Modal>
  );
}
